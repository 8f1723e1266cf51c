"""The options that all sampling command lines share: sample.py, sample_sd3.py and sample_flux.py."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from backends import DTYPES
from common.errors import UserError
from common.plugins import NameOrCode
from common.resolution import RESOLUTION_HELP, Resolution
from solvers import BASELINES, FINISHES

from .request import ALIASES

Decorator = Callable[[Callable], Callable]
SEEDS_HELP = 'Such as "0,3,10-12"; a seed names one image.'
BATCH_HELP = "Images in a batch."
PARALLEL_HELP = (
    "What the processes of torchrun divide: batches of images, the points of each level, or those and the"
    " branches of CFG."
)
COMPILE_HELP = (
    "Compile the network's repeated blocks, once for each shape: it takes a while before the first image,"
    " then less for each."
)
OFFLOAD_HELP = (
    "Encode all prompts first, free the text encoders, and only then put the network on the device."
)


class EitherSpelling(click.Command):
    """Options may be written with - or _."""

    def __init__(self, name: str | None, **settings: Any):
        spelling = {"token_normalize_func": lambda text: text.replace("_", "-")}
        super().__init__(name, **{**settings, "context_settings": spelling})


def as_json(context: click.Context, parameter: click.Parameter, text: str | None) -> dict | None:
    """A JSON object of an option."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--backend-config {text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f'--backend-config {text!r}: expected a JSON object such as {{"resolution": 512}}')
    return value


def choice(name: str, names: Collection[str], default: str, text: str) -> Decorator:
    """An option that is one of some names."""
    return click.option(name, type=click.Choice(list(names)), default=default, show_default=True, help=text)


def switch(name: str, text: str) -> Decorator:
    """An option that is on when it is given, or takes true or false."""
    return click.option(
        name, type=click.BOOL, is_flag=False, flag_value="true", default=False, metavar="[BOOL]", help=text
    )


resolution_option = click.option(
    "--resolution", type=Resolution(), help=f"{RESOLUTION_HELP}; the predictor's by default."
)
SHARED: tuple[Decorator, ...] = (
    click.option(
        "--solver",
        type=NameOrCode(["epd", *BASELINES, *ALIASES]),
        default="epd",
        show_default=True,
        help="epd is whatever the predictor describes; my_module:NAME is a solver of your own.",
    ),
    click.option(
        "--backend-config", callback=as_json, help="JSON object of backend options, over the predictor's."
    ),
    click.option("--prompt", help="One prompt for all seeds."),
    click.option(
        "--prompt-file", type=click.Path(path_type=Path), help="Text, CSV or COCO file; its prompts repeat."
    ),
    click.option("--num-steps", type=click.IntRange(2, 1000), help="Number of nodes, for a baseline."),
    click.option("--steps-match", is_flag=True, help="Give the baseline the predictor's serial depth."),
    click.option(
        "--guidance", type=click.FloatRange(0), help="Guidance scale, 1 for none; the predictor's by default."
    ),
    choice("--finish", FINISHES, "none", "After the last node above 0."),
    click.option("--device", help="cpu, cuda, cuda:1, mps; CUDA where there is one by default."),
    choice("--dtype", ["auto", *DTYPES], "auto", "Of the network."),
    choice("--parallel", ["images", "points", "points-cfg"], "images", PARALLEL_HELP),
    switch("--compile", COMPILE_HELP),
    switch("--offload", OFFLOAD_HELP),
    switch("--grid", "A grid of every batch beside the images."),
)


def sampling_options(command: Callable) -> Callable:
    """The shared options on a command line."""
    for option in reversed(SHARED):
        command = option(command)
    return command
