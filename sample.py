"""Sample images from text prompts with a learned or a classical solver: python sample.py --help."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import click
from torch import Tensor

import backends
from backends import SCHEDULES, check_backbone_known, check_backend, load_backend
from backends.distributed import Ranks, process_group, tell_of_sigterm
from backends.points import Points
from backends.prompts import COCO, parse_seeds, read_prompts
from generation import Output, Sampler, generate
from sample_options import ALIASES, BATCH_HELP, SEEDS_HELP, SWITCH, EitherSpelling, sampling_options
from solvers import (
    BASELINES,
    Predictor,
    Solver,
    Spec,
    Tableau,
    UserError,
    baseline_of,
    load_predictor,
    num_steps_for_depth,
    resolve_predictor_path,
)
from solvers.errors import note, run_command
from solvers.predictor.options import lift_options


@dataclass(frozen=True)
class Choice:
    """What the command line asks of the sampler; None where it leaves the choice to the predictor or the backend."""

    predictor_path: str | None = None
    solver: str = "epd"
    backend: str | None = None
    backend_config: dict | None = None
    model_path: str | None = None
    num_steps: int | None = None
    schedule: str | None = None
    guidance: float | None = None
    steps_match: bool = False
    finish: str = "none"
    dtype: str = "auto"
    parallel: str = "images"
    compile: bool = False
    offload: bool = False


def choose_prompts(prompt: str | None, prompt_file: Path | None, spec: Spec, empty: bool) -> list[str]:
    """The prompts of the command line; for want of any the digits', the COCO captions where they are there, or the `empty` one."""
    if prompt is not None:
        if prompt_file is not None:
            note(f"--prompt is given: --prompt-file {prompt_file} is not read")
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"--prompt {prompt!a}: not UTF-8 text")
        return [prompt]
    if prompt_file is not None:
        return read_prompts(prompt_file, "--prompt-file")
    if spec.backend == "digits":
        from backends.digits.data import ALL_LABELS, evaluation_prompts

        return evaluation_prompts(len(ALL_LABELS))
    if empty:
        note("neither --prompt nor --prompt-file is given: the empty prompt is used")
        return [""]
    if spec.dataset_name == "ms_coco" and COCO.is_file():
        note(f"neither --prompt nor --prompt-file is given: the captions of {COCO} are used")
        return read_prompts(COCO, "--prompt-file")
    raise UserError("no prompts: give --prompt TEXT or --prompt-file FILE")


def agree(name: str, asked: object, recorded: object, path: Path | None) -> None:
    """Refuse a choice that contradicts what a table was made for."""
    if asked is not None and recorded is not None and asked != recorded:
        raise UserError(f"{name} is {asked!r}, but {path} was made for {recorded!r}; leave the option out, or use another predictor")


def settle(choice: Choice, predictor: Predictor | None, path: Path | None) -> Spec:
    """One spec: the command line over what the predictor recorded; a contradiction is an error that names both."""
    recorded = Spec() if predictor is None else predictor.spec
    asked, of_schedule = lift_options(choice.backend_config or {})
    if choice.solver == "epd":
        for key, value in of_schedule.items():
            agree(f"--backend-config {key}", value, vars(recorded)[key], path)
        agree("--backend", choice.backend, recorded.backend, path)
        for key in ("family", "resolution"):
            agree(key, asked.get(key), recorded.backend_config.get(key), path)
        agree("--schedule", choice.schedule, recorded.schedule_type, path)
        agree("--num-steps", choice.num_steps, recorded.num_steps, path)
    elif choice.backend not in (None, recorded.backend):
        recorded = Spec()  # a baseline on another backbone has nothing to do with what the table was made for
    switched = {name: True for name in ("compile", "offload") if vars(choice)[name]}
    config = {**recorded.backend_config, **asked, **switched}
    if choice.model_path is not None:
        config["model_name_or_path"] = choice.model_path
    return replace(
        recorded,
        **of_schedule,
        backend=choice.backend or recorded.backend or ("digits" if predictor is None else None),
        backend_config=config,
        num_steps=choice.num_steps or recorded.num_steps,
        schedule_type=choice.schedule or recorded.schedule_type,
        guidance_rate=recorded.guidance_rate if choice.guidance is None else choice.guidance,
    )


@dataclass(frozen=True)
class Decision:
    """What a command line comes to: the settled spec, the solver, and the predictor's file and nodes where one is used."""

    spec: Spec
    solver: Solver
    name: str
    path: Path | None = None
    sigmas: Tensor | None = None
    fixed_nodes: bool = False  # not learned: the schedule's own
    notes: tuple[str, ...] = ()


def decide(choice: Choice) -> Decision:
    """Settle a command line; every contradiction is found before any weights load."""
    path = None if choice.predictor_path is None else resolve_predictor_path(choice.predictor_path)
    predictor = None if path is None else load_predictor(path)
    name = ALIASES.get(choice.solver, choice.solver)
    if predictor is not None and (name == "epd" or choice.backend is None):
        check_backbone_known(predictor.spec, path)
    spec = settle(replace(choice, solver=name), predictor, path)
    if name == "epd":
        if predictor is None:
            raise UserError("--solver epd needs a learned table: give --predictor-path (such as exps/digits), or another --solver")
        if choice.steps_match:
            raise UserError("--steps-match fits a baseline to the predictor; choose a --solver other than epd")
        learned = predictor.provenance.get("learned_sigmas") or isinstance(predictor.table, Tableau)
        name = "tableau" if isinstance(predictor.table, Tableau) else name
        fixed = predictor.sigmas is not None and not learned
        found = Decision(spec, predictor.solver(), name, path, predictor.sigmas, fixed, tuple(predictor.notices()))
    else:
        found = Decision(match_steps(choice, spec, predictor, name), BASELINES[name], name)
    check_backend(found.spec)
    return found


def make_sampler(decision: Decision, choice: Choice, ranks: Ranks) -> Sampler:
    """The sampler of a settled command line."""
    spec = decision.spec
    backend = load_backend(spec, ranks.device, None if choice.dtype == "auto" else choice.dtype)
    sigmas = backend.sigmas(spec) if decision.sigmas is None else decision.sigmas
    if ranks.rank == 0 and decision.fixed_nodes and (note := backend.nodes_note(spec, sigmas)):
        click.echo(note, err=True)
    guidance = backend.default_guidance if spec.guidance_rate is None else spec.guidance_rate
    solver = baseline_of(decision.name, backend.flow) if decision.name in BASELINES else decision.solver
    sampler = Sampler(backend, solver, decision.name, sigmas, guidance, choice.finish, decision.path)
    return sampler if choice.parallel == "images" else share_points(sampler, choice.parallel, ranks)


def share_points(sampler: Sampler, parallel: str, ranks: Ranks) -> Sampler:
    """The sampler whose points, and with "points-cfg" guidance branches, are shared out over the ranks."""
    branches = sampler.guidance_rows if parallel == "points-cfg" else 1
    tasks = branches * max(len(level) for level in sampler.cost.levels)
    useful = -(-tasks // -(-tasks // ranks.world))  # each rank takes as many as the busiest one, until there are none left
    if ranks.rank == 0 and ranks.world == 1:
        click.echo(f"note: --parallel {parallel} has one process: start up to {tasks} with torchrun", err=True)
    elif ranks.rank == 0 and ranks.world > useful:
        click.echo(f"note: --parallel {parallel} gives work to {useful} of {ranks.world} processes: start {useful}", err=True)
    return replace(sampler, points=Points(ranks if ranks.world > 1 else None, branches == 2))


def match_steps(choice: Choice, spec: Spec, predictor: Predictor | None, name: str) -> Spec:
    """The spec with the nodes that --steps-match asks for, or with those given."""
    if choice.steps_match:
        if predictor is None or choice.num_steps is not None:
            raise UserError("--steps-match takes the serial depth of a predictor: give --predictor-path, and no --num-steps")
        depth = predictor.cost(choice.finish).depth
        return replace(spec, num_steps=num_steps_for_depth(BASELINES[name], depth, choice.finish))
    if spec.num_steps is None:
        raise UserError(f"--solver {name} needs --num-steps N (number of nodes), or --steps-match with a --predictor-path")
    return spec


@click.command(cls=EitherSpelling)
@click.option("--predictor-path", "--predictor", help="Learned table: a .pkl, a run folder, a name or number under exps.")
@click.option("--backend", type=click.Choice(backends.NAMES), help="Backbone; the predictor's by default, else digits.")
@click.option("--model-path", "--model-id", help="Folder, hub id, or single .safetensors/.ckpt file of the backbone.")
@click.option("--seeds", default="0-63", show_default=True, help=SEEDS_HELP)
@click.option("--batch", "--max-batch-size", type=click.IntRange(1), default=64, show_default=True, help=BATCH_HELP)
@click.option("--schedule", type=click.Choice(SCHEDULES), help="How nodes are made, for a baseline.")
@sampling_options
@click.option("--use-fp16", **SWITCH, help="The same as --dtype float16.")
@click.option("--outdir", type=click.Path(path_type=Path), help="Default: samples/BACKEND/SOLVER-depthD-evalsE.")
@click.option("--subdirs/--no-subdirs", default=True, show_default=True, help="A folder for every 1000 seeds.")
@click.option("--return-inters", **SWITCH, help="The decoded state after every step beside the images.")
def main(seeds, prompt, prompt_file, batch, device, use_fp16, outdir, subdirs, grid, return_inters, **choice) -> None:
    """Sample images from text prompts. Run again, it goes on where it stopped; torchrun shares the work out."""
    choice = Choice(**choice)
    if use_fp16:
        if choice.dtype not in ("auto", "float16", "fp16"):
            raise UserError(f"--use_fp16 contradicts --dtype {choice.dtype}; give one of the two")
        choice = replace(choice, dtype="float16")
    produce(choice, parse_seeds(seeds), (prompt, prompt_file), device, Output(outdir, batch, subdirs, grid, return_inters))


def produce(choice: Choice, seeds: list[int], told: tuple[str | None, Path | None], device: str | None, output: Output) -> None:
    """Make the images of a command line and say what they cost; `told` is its prompt or its file of prompts.

    Where prompts pair by position, as in the command lines of one family, the empty prompt stands in for none.
    """
    if choice.guidance is not None and not math.isfinite(choice.guidance):
        raise UserError(f"--guidance {choice.guidance}: expected a finite number")
    with process_group(device) as ranks:
        if ranks.world > 1:
            tell_of_sigterm()
        decision = decide(choice)
        for text in decision.notes:
            note(f"{decision.path}: {text}")
        prompts = choose_prompts(*told, decision.spec, output.pair_by_position)
        sampler = make_sampler(decision, choice, ranks)
        cost = sampler.cost
        name = f"{sampler.solver_name}-depth{cost.depth}-evals{cost.evaluations}"
        output = replace(output, outdir=output.outdir or Path("samples", sampler.backend.name, name))
        if ranks.rank == 0:
            rows = "2 rows" if sampler.guidance_rows == 2 else "1 row"
            guided = "" if sampler.guidance_scale == 1 else f", guidance {sampler.guidance_scale:g} (each evaluation on {rows})"
            source = "" if decision.path is None else f" from {decision.path}"
            click.echo(f"{sampler.solver_name}{source}: serial depth {cost.depth}, {cost.evaluations} evaluations an image{guided}")
        generate(sampler, prompts, seeds, output, ranks)
        if ranks.rank == 0:
            click.echo(f"{len(seeds)} images in {output.outdir}")


if __name__ == "__main__":
    run_command(main)
