"""Distil a table for a model of one's own: python -m training.distill.own_model NAME --model DIR --steps N.

The family comes from the folder's model_index.json; all else from the shipped configuration of that family.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from backends import find_family
from backends.model_family import AUTO, family_of_model
from backends.model_ids import PIPELINES
from common.errors import run_command
from common.resolution import RESOLUTION_HELP, Resolution, image_size
from solvers import UserError

from ..config import load_config, with_overrides
from ..estimates import SMALLEST_IMAGE, distill_estimates, measured_time
from ..launch import RunOptions, active_run, run_options
from ..processes import Processes
from ..start import Start
from .config import (
    BankConfig,
    DistillConfig,
    EvaluationConfig,
    LossConfig,
    NodesConfig,
    StudentConfig,
    TeacherConfig,
)
from .launch import checked_start, distill, load_frozen, plan
from .students import STUDENTS

CONFIGS = Path(__file__).parent / "cfgs"
BASES = {"ldm": "sd15", "sd3": "sd3_1024", "flux": "flux_dev"}
SMALL_BASES = {"ldm": "digits", "sd3": "digits_sd3", "flux": "digits_flux"}
FLOW_BASE, NOISE_BASE = (
    "flux",
    "ldm",
)  # whose settings other families have: flow matching, and a U-Net of noise
SIZE_PARTS = {
    "ldm": "unet",
    "sdxl": "unet",
    "flux": "vae",
}  # of a pipeline, with its sample_size; else transformer
"""The part of a pipeline folder whose sample_size is that of the images: of latents, but for the VAE's."""
BASELINES = ["euler", "ipndm2", "dpmpp", "unipc"]
STEEP_GUIDANCE, STEEP_STEPS = 5.0, 10
"""From both on, a tableau amplifies what it is given, and is learned in smaller steps."""

STUDENT_HELP = "tableau (default), one evaluation a call; epd, two points side by side every second call."


class OwnModelError(UserError):
    """A model or a number of steps that cannot be distilled; the message is one line with the remedy."""


@dataclass(frozen=True)
class OwnModel:
    """The model and the table that the command line asks for; None is left to the model."""

    model: str
    steps: int | None = None
    """Network calls one after another."""
    backend: str | None = None
    student: str = "tableau"
    guidance: float | None = None
    resolution: int | str | None = None
    prompts: str | None = None
    pairs: int = 128
    train_steps: int = 100


def family_of(model: str, backend: str | None) -> str:
    """The family of a model, from the class in its model_index.json; of a single file, `backend`.

    Raises:
        UserError: no such model, an unknown class, a contradiction, or a single file without `backend`.
    """
    if backend in (None, AUTO):
        return family_of_model(model)
    path = Path(model).expanduser()
    if (path / "model_index.json").is_file() and (family := family_of_model(model)) != backend:
        raise OwnModelError(f"--backend is {backend}, but {path / 'model_index.json'} is of family {family}")
    return str(backend)


def resolution_of(model: str, family: str) -> int | None:
    """Pixels a side of the images that a pipeline folder was made for; None where it does not say."""
    path = Path(model).expanduser()
    try:
        network, vae = (
            json.loads((path / part / "config.json").read_text(encoding="utf-8"))
            for part in (SIZE_PARTS.get(family, "transformer"), "vae")
        )
        size = int(network["sample_size"])
        return size if family == "flux" else size * 2 ** (len(vae["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a single file, a hub id; a broken folder is reported when it is loaded


def student_of(own: OwnModel, steps: int, damping: float) -> StudentConfig:
    """The student of so many network calls one after another, as in the grid of the digits."""
    if own.student == "tableau":
        start = StudentConfig(kind="tableau", start="baseline", depth=steps, num_points=1)
        return replace(start, moment_damping=damping, learn_sigmas=True)
    if steps % 2:
        raise OwnModelError(
            f"--steps {steps}: an EPD step takes two network calls one after another; give an even number,"
            " or --student tableau"
        )
    return StudentConfig(num_points=2, start="low", scale_dir=0.5, scale_time=0.2, learn_sigmas=True)


def shipped_configuration(name: str, small: bool) -> DistillConfig:
    """The shipped configuration of a family: that of its published model, or of its digits; a family without
    one has that of a family like it.
    """
    like = name if name in BASES else FLOW_BASE if find_family(name).flow else NOISE_BASE
    return load_config(DistillConfig, CONFIGS / f"{(SMALL_BASES if small else BASES)[like]}.yaml")


def configuration(own: OwnModel, overrides: Sequence[str] = ()) -> DistillConfig:
    """The configuration of a run: the shipped one of the model's family, for the model and table asked for.

    Args:
        own: the model and the table.
        overrides: more settings, section.key=value, over all others.
    """
    if own.steps is None:
        raise OwnModelError("--steps is not given: how many network calls one after another, such as 8")
    name = family_of(own.model, own.backend)
    resolution = own.resolution or resolution_of(own.model, name)
    small = resolution is not None and max(image_size(resolution)) < SMALLEST_IMAGE
    shipped, family = shipped_configuration(name, small), find_family(name)
    guidance = family.backend.default_guidance if own.guidance is None else own.guidance
    steep = guidance > STEEP_GUIDANCE and own.steps >= STEEP_STEPS
    lr, damping = (0.03, 0.5) if steep else (0.1, 0.1)
    options = {"model_name_or_path": own.model} | ({} if resolution is None else {"resolution": resolution})
    train = replace(shipped.train, steps=own.train_steps)
    config = replace(
        shipped,
        backend=replace(shipped.backend, name=name, config=options),
        dataset_name=None,
        guidance_scale=guidance,
        nodes=NodesConfig(own.steps // 2 + 1, family.backend.default_schedule),
        student=student_of(own, own.steps, damping),
        teacher=teacher_of(shipped, "flowmatch" if family.flow else "polynomial"),
        bank=bank_of(own, shipped.bank),
        loss=LossConfig(),
        train=train if own.student == "epd" else replace(train, lr=lr),
        evaluation=evaluation_of(own, shipped.evaluation),
    )
    return with_overrides(config, overrides)


def teacher_of(shipped: DistillConfig, schedule: str) -> TeacherConfig:
    """The teacher, with as many intervals as in the shipped configuration. Its end is all that is kept, so
    one bank serves tables of any number of steps.
    """
    kept = shipped.teacher.intervals or shipped.nodes.num_steps - 1
    return TeacherConfig("dpm2", schedule, 1, kept * (shipped.teacher.inner + 1) - 1)


def bank_of(own: OwnModel, shipped: BankConfig) -> BankConfig:
    """The pairs."""
    held_out = max(2, min(shipped.heldout_pairs, own.pairs // 2))
    return replace(shipped, prompts=own.prompts, pairs=own.pairs, heldout_pairs=held_out)


def evaluation_of(own: OwnModel, shipped: EvaluationConfig) -> EvaluationConfig:
    """Four held-out evaluations, beside a few baselines."""
    interval, tuning = max(1, own.train_steps // 4), min(shipped.tuning_pairs, own.pairs)
    return replace(shipped, interval=interval, baselines=BASELINES, tuning_pairs=tuning, depths=[])


def first_lines(config: DistillConfig, start: Start | None) -> list[str]:
    """What will be learned, for which model."""
    cost, options = STUDENTS[config.student.kind].cost(config, start), config.backend.config
    nodes = "" if config.student.kind == "tableau" else f"{config.nodes.num_steps} nodes, "
    size = f" at {options['resolution']} pixels" if "resolution" in options else ""
    return [
        (
            f"{options.get('model_name_or_path')}: family {config.backend.name}{size}, guidance"
            f" {config.guidance_scale:g}"
        ),
        (
            f"student: {cost.depth} network calls one after another, {nodes}NFE {cost.evaluations} an image;"
            f" num_inference_steps={cost.evaluations} in a diffusers pipeline"
        ),
    ]


def check_resumed(own: OwnModel, config: DistillConfig) -> None:
    """Refuse settings beside --resume, and another model than that of the run."""
    changed = [f.name for f in fields(own) if vars(own)[f.name] not in (None, f.default)]
    given = [f"--{name.replace('_', '-')}" for name in changed if name != "model"]
    recorded = config.backend.config.get("model_name_or_path")
    if given:
        raise OwnModelError(f"--resume goes on with a run as it was started; leave out {', '.join(given)}")
    if own.model != recorded:
        raise OwnModelError(f"--model is {own.model}, but the run to go on with has {recorded}")


def model_options(command: Callable) -> Callable:
    """The options of OwnModel on a click command, which gets them together as its first argument."""
    students = click.Choice(("tableau", "epd"))
    families = click.Choice((AUTO, *dict.fromkeys(PIPELINES.values())))
    at_least = click.IntRange
    options = [
        click.option(
            "--model", required=True, help="Pipeline folder or hub id; a single file with --backend."
        ),
        click.option("--steps", type=at_least(2), help="Network calls one after another."),
        click.option("--backend", type=families, help="Family, where --model does not name it."),
        click.option("--student", type=students, default="tableau", help=STUDENT_HELP),
        click.option("--guidance", type=click.FloatRange(0), help="CFG scale; by default the family's own."),
        click.option("--resolution", type=Resolution(), help=f"{RESOLUTION_HELP}; else the model's own."),
        click.option("--prompts", help='File, or "digits"; by default src/prompts/train.txt.'),
        click.option("--pairs", type=at_least(2), default=128, help="Of prompt and seed; 128 by default."),
        click.option("--train-steps", type=at_least(1), default=100, help="Of Adam; 100 by default."),
    ]

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        own = OwnModel(**{f.name: values.pop(f.name) for f in fields(OwnModel)})
        return command(own, **values)

    for option in reversed(options):
        collected = option(collected)
    return collected


@click.command()
@click.argument("name")
@model_options
@run_options(None)
@click.option(
    "--exps",
    type=click.Path(path_type=Path),
    default=Path("exps"),
    show_default=True,
    help="Where run folders are.",
)
def main(own: OwnModel, options: RunOptions, name: str, exps: Path) -> None:
    """Learn a table for the model of --model; the run folder's name ends in NAME."""
    if options.resume is None:
        run, config = None, configuration(own, options.overrides)
    else:
        run = options.find_run(exps, kind="teacher")
        config = options.load_config(DistillConfig, run)
        check_resumed(own, config)
    start = checked_start(config)
    lines = first_lines(config, start)
    if options.dry_run:
        click.echo("\n# ".join([plan(config, start), *lines]))
        return
    with active_run(options, run, config, name, exps) as active:
        processes = Processes(active.ranks)
        processes.echo("\n".join([*lines, *distill_estimates(config, start)]))
        backend = load_frozen(config, active.ranks.device)
        if not config.backend.config.get("offload"):  # which frees the text encoders at the first call
            processes.echo(measured_time(config, start, backend))
        distill(config, start, active, backend)


if __name__ == "__main__":
    run_command(main)
