"""Runs the sampling command lines in this process and reads what they write."""

import json
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sample
from solvers import UserError


def invoke(line: str, *more: object, command: click.Command = sample.main) -> str:
    """Run a command line, a text and further arguments; returns what it prints, and errors come out as they
    are.
    """
    arguments = [*shlex.split(line), *map(str, more)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(line: str, *more: object, command: click.Command = sample.main) -> str:
    """The one line with which a command line refuses its arguments."""
    with pytest.raises(UserError) as error:
        invoke(line, *more, command=command)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Every image below a folder by relative name."""
    paths = sorted(folder.rglob("*.png"))
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in paths}


def manifest(folder: Path) -> list[dict]:
    """The records of a folder's images."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """The bytes of every file below a folder by relative name."""
    paths = sorted(folder.rglob(pattern))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}
