"""Sample images with FLUX.1-dev: python sample_flux.py --help."""

import importlib.util
import os
import sys
from pathlib import Path

import click
from huggingface_hub import get_token, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from backends.model_ids import MODELS, flux_model
from common.errors import run_command
from generation.commands import FamilyDefaults, family_command

PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def check(model_path: str | None) -> None:
    """One line for each thing that the real model needs, and whether it is there; exit status 2 if one is
    missing.
    """
    model = model_path or flux_model()
    folder = Path(model).expanduser()
    remote = os.environ.get("FLUX_ALLOW_REMOTE") == "1"
    here = (folder / "model_index.json").is_file() or cached(model)
    lines = [
        (importlib.util.find_spec(name) is not None, f"package {name}", f"pip install {name}")
        for name in PACKAGES
    ]
    lines.append(
        (
            here or remote,
            f"weights {model}",
            f"run 'hf download {model}', set FLUX_MODEL_PATH to a folder, or FLUX_ALLOW_REMOTE=1",
        )
    )
    if not here and model == MODELS["flux"]:
        lines.append(
            (
                get_token() is not None,
                "licence of FLUX.1-dev",
                "accept it at the model's page and run 'hf auth login'",
            )
        )
    for there, what, remedy in lines:
        click.echo(f"{what}: {'found' if there else f'missing; {remedy}'}")
    if not all(there for there, _, _ in lines):
        sys.exit(2)


def cached(model: str) -> bool:
    """Whether the local cache of the hub has a model; a text that cannot be a hub id is not there."""
    try:
        return isinstance(try_to_load_from_cache(model, "model_index.json"), str)
    except HFValidationError:
        return False


main = family_command(
    FamilyDefaults(
        "flux",
        "Sample images with FLUX.1-dev from text prompts. Run again, it goes on where it stopped.",
        seeds="0",
        batch=1,
        outdir="samples/flux_epd",
        exps={1024: "exps/flux"},
        check=check,
    )
)

if __name__ == "__main__":
    run_command(main)
