"""Sizes of images: pixels a side, or "WIDTHxHEIGHT"."""

import re
from typing import Any

import click

from .errors import UserError

SIZE = r"(\d{1,5})x(\d{1,5})"
RESOLUTION_HELP = "Pixels a side, or WIDTHxHEIGHT such as 1024x768"


def image_size(resolution: int | str) -> tuple[int, int]:
    """Width and height in pixels of a resolution, 1024 or "1024x768"; another text: UserError."""
    if isinstance(resolution, int):
        return resolution, resolution
    match = re.fullmatch(SIZE, resolution)
    if match is None:
        raise UserError(
            f"resolution {resolution!r}: expected pixels a side such as 1024, or WIDTHxHEIGHT such as"
            " 1024x768"
        )
    return int(match[1]), int(match[2])


def is_resolution(value: int | str) -> bool:
    """Whether a value has a size."""
    return isinstance(value, int) or re.fullmatch(SIZE, value) is not None


def resolution_of(width: int, height: int) -> int | str:
    """The resolution of a size: an int where it is a square."""
    return width if width == height else f"{width}x{height}"


class Resolution(click.ParamType):
    """An option that takes pixels a side, or WIDTHxHEIGHT."""

    name = "resolution"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        width, height = image_size(int(value) if str(value).isdigit() else value)
        if not width * height:
            raise UserError(f"resolution {value!r}: expected pixels above 0")
        return resolution_of(width, height)
