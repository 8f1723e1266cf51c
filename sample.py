"""Sample images from text prompts with a learned or a classical solver: python sample.py --help."""

from dataclasses import replace
from pathlib import Path

import click

import backends
from backends import SCHEDULES
from backends.model_family import AUTO
from common.errors import UserError, run_command
from common.plugins import NameOrCode
from common.prompts import parse_seeds
from generation.generate import run_request
from generation.options import (
    BATCH_HELP,
    SEEDS_HELP,
    EitherSpelling,
    resolution_option,
    sampling_options,
    switch,
)
from generation.output import Output
from generation.request import PromptOptions, SamplingRequest

PREDICTOR_HELP = "Learned table: a .pkl, a run folder, a name or number under exps."
BACKEND_HELP = (
    "Backbone, or my_module:FAMILY; auto: the family of --model-path; the predictor's by default,"
    " else digits."
)
MODEL_HELP = "Folder, hub id, or single .safetensors/.ckpt file of the backbone."
OUTDIR_HELP = "Default: samples/BACKEND/SOLVER-depthD-evalsE."
FILES = ("outdir", "batch", "subdirs", "grid", "return_inters")


@click.command(cls=EitherSpelling)
@click.option("--predictor-path", "--predictor", help=PREDICTOR_HELP)
@click.option("--backend", type=NameOrCode([AUTO, *backends.NAMES]), help=BACKEND_HELP)
@click.option("--model-path", "--model-id", help=MODEL_HELP)
@resolution_option
@click.option("--seeds", default="0-63", show_default=True, help=SEEDS_HELP)
@click.option(
    "--batch", "--max-batch-size", type=click.IntRange(1), default=64, show_default=True, help=BATCH_HELP
)
@click.option("--schedule", type=click.Choice(SCHEDULES), help="How nodes are made, for a baseline.")
@sampling_options
@switch("--use-fp16", "The same as --dtype float16.")
@click.option("--outdir", type=click.Path(path_type=Path), help=OUTDIR_HELP)
@click.option(
    "--subdirs/--no-subdirs", default=True, show_default=True, help="A folder for every 1000 seeds."
)
@switch("--return-inters", "The decoded state after every step beside the images.")
def main(seeds, prompt, prompt_file, device, use_fp16, **options) -> None:
    """Sample images from text prompts. Run again, it goes on where it stopped; torchrun divides the work."""
    output = Output(**{name: options.pop(name) for name in FILES})
    request = SamplingRequest(**options)
    if use_fp16:
        if request.dtype not in ("auto", "float16", "fp16"):
            raise UserError(f"--use_fp16 contradicts --dtype {request.dtype}; give one of the two")
        request = replace(request, dtype="float16")
    run_request(request, parse_seeds(seeds), PromptOptions(prompt, prompt_file), device, output)


if __name__ == "__main__":
    run_command(main)
