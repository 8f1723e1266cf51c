"""The command lines of one family, made from sample.py's: sample_sd3.py and sample_flux.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from backends import check_backbone_known
from common.errors import UserError
from common.prompts import parse_seeds
from common.resolution import image_size
from solvers import load_predictor, resolve_predictor_path

from .generate import run_request
from .options import BATCH_HELP, SEEDS_HELP, EitherSpelling, resolution_option, sampling_options
from .output import Output
from .request import PromptOptions, SamplingRequest


@dataclass(frozen=True)
class FamilyDefaults:
    """What the command line of one family has of its own."""

    family: str
    title: str
    seeds: str
    batch: int
    outdir: str
    exps: dict[int, str]
    """The default predictor of each resolution, the first one the default."""
    check: Callable[[str | None], None] | None = None
    """Prints what is missing to run the real model."""


def family_command(defaults: FamilyDefaults) -> click.Command:
    """The command line of one family: sample.py's, with the family's defaults and fewer options."""
    exps, batch = defaults.exps, defaults.batch

    @click.command(cls=EitherSpelling, help=defaults.title)
    @click.option(
        "--predictor", "--predictor-path", help=f"Learned table; by default {' or '.join(exps.values())}."
    )
    @click.option("--model-path", "--model-id", help="Folder or hub id of the backbone.")
    @resolution_option
    @click.option("--seeds", default=defaults.seeds, show_default=True, help=SEEDS_HELP)
    @click.option(
        "--batch",
        "--max-batch-size",
        type=click.IntRange(1),
        default=batch,
        show_default=True,
        help=BATCH_HELP,
    )
    @sampling_options
    @click.option(
        "--outdir", type=click.Path(path_type=Path), default=Path(defaults.outdir), show_default=True
    )
    def command(only_check=False, **options) -> None:
        if only_check and defaults.check is not None:
            defaults.check(options["model_path"])
            return
        seeds, device = parse_seeds(options.pop("seeds")), options.pop("device")
        prompts = PromptOptions(options.pop("prompt"), options.pop("prompt_file"), allow_empty=True)
        files = {name: options.pop(name) for name in ("outdir", "batch", "grid")}
        request = family_request(defaults, **options)
        run_request(request, seeds, prompts, device, Output(**files, pair_by_position=True))

    if defaults.check is None:
        return command
    help_text = "Say what is missing to run the real model, and do nothing else."
    return click.option("--check", "only_check", is_flag=True, help=help_text)(command)


def family_request(
    defaults: FamilyDefaults, predictor: str | None, resolution: int | str | None, **options
) -> SamplingRequest:
    """The request of a family's command line; a predictor of another family: UserError."""
    if predictor is None and (options["solver"] == "epd" or options["steps_match"]):
        side = max(image_size(resolution or 0))
        predictor = defaults.exps.get(side, next(iter(defaults.exps.values())))
    request = SamplingRequest(predictor, resolution=resolution, **options)
    if predictor is None:
        return replace(request, backend=defaults.family)
    path = resolve_predictor_path(predictor)
    spec = load_predictor(path).spec
    check_backbone_known(spec, path)
    if spec.family != defaults.family:
        raise UserError(
            f"--predictor {predictor} was made for {spec.family}, but this command is for {defaults.family}; "
            "use sample.py"
        )
    return request
