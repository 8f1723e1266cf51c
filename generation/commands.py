"""What the sampling command lines do: sample.py, and sample_sd3.py and sample_flux.py, which are made from
it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click

from backends import check_backbone_known
from common.distributed import Ranks, install_sigterm_handler, process_group
from common.errors import UserError, note
from common.prompts import COCO, parse_seeds, read_prompts
from solvers import Spec, load_predictor, resolve_predictor_path

from .generate import generate
from .options import BATCH_HELP, SEEDS_HELP, EitherSpelling, sampling_options
from .output import Output
from .request import ResolvedRequest, SamplingRequest, make_sampler, resolve
from .sampler import Sampler


@dataclass(frozen=True)
class PromptOptions:
    """--prompt, --prompt-file, and whether the empty prompt is used for want of both."""

    prompt: str | None
    prompt_file: Path | None
    allow_empty: bool = False

    def read(self, spec: Spec) -> list[str]:
        """The prompts; for want of any the digits', the COCO captions where their file exists, or the empty
        one.
        """
        if self.prompt is not None:
            return [self._checked(self.prompt)]
        if self.prompt_file is not None:
            return read_prompts(self.prompt_file, "--prompt-file")
        if spec.backend == "digits":
            from digits.data import ALL_LABELS, evaluation_prompts

            return evaluation_prompts(len(ALL_LABELS))
        if self.allow_empty:
            note("neither --prompt nor --prompt-file is given: the empty prompt is used")
            return [""]
        if spec.dataset_name == "ms_coco" and COCO.is_file():
            note(f"neither --prompt nor --prompt-file is given: the captions of {COCO} are used")
            return read_prompts(COCO, "--prompt-file")
        raise UserError("no prompts: give --prompt TEXT or --prompt-file FILE")

    def _checked(self, prompt: str) -> str:
        if self.prompt_file is not None:
            note(f"--prompt is given: --prompt-file {self.prompt_file} is not read")
        if not prompt.isprintable() and any("\ud800" <= c <= "\udfff" for c in prompt):
            raise UserError(f"--prompt {prompt!a}: not UTF-8 text")
        return prompt


def run_request(
    request: SamplingRequest, seeds: list[int], prompts: PromptOptions, device: str | None, output: Output
) -> None:
    """Make the images of a command line and print what they cost."""
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise UserError(f"--guidance {request.guidance}: expected a finite number")
    with process_group(device) as ranks:
        if ranks.world > 1:
            install_sigterm_handler()
        resolved = resolve(request)
        for text in resolved.notes:
            note(f"{resolved.path}: {text}")
        texts = prompts.read(resolved.spec)
        sampler = make_sampler(resolved, ranks)
        output = replace(output, outdir=output.outdir or default_outdir(sampler))
        report(describe(sampler, resolved), ranks)
        generate(sampler, texts, seeds, output, ranks)
        report(f"{len(seeds)} images in {output.outdir}", ranks)


def report(text: str, ranks: Ranks) -> None:
    """Print a line once for all ranks."""
    if ranks.rank == 0:
        click.echo(text)


def default_outdir(sampler: Sampler) -> Path:
    """samples/BACKEND/SOLVER-depthD-evalsE."""
    cost = sampler.cost
    name = f"{sampler.solver_name}-depth{cost.depth}-evals{cost.evaluations}"
    return Path("samples", sampler.backend.name, name)


def describe(sampler: Sampler, resolved: ResolvedRequest) -> str:
    """Solver, predictor, cost and guidance in a line."""
    cost, scale = sampler.cost, sampler.guidance_scale
    rows = "2 rows" if sampler.cfg_rows == 2 else "1 row"
    guidance = "" if scale == 1 else f", guidance {scale:g} (each evaluation on {rows})"
    source = "" if resolved.path is None else f" from {resolved.path}"
    nfe = f"serial depth {cost.depth}, {cost.evaluations} evaluations an image"
    return f"{sampler.solver_name}{source}: {nfe}{guidance}"


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
    @click.option("--resolution", type=click.IntRange(1), help="Pixels a side; the predictor's by default.")
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
    defaults: FamilyDefaults, predictor: str | None, resolution: int | None, **options
) -> SamplingRequest:
    """The request of a family's command line; a predictor of another family: UserError."""
    if predictor is None and (options["solver"] == "epd" or options["steps_match"]):
        predictor = defaults.exps.get(resolution or 0, next(iter(defaults.exps.values())))
    config = options.pop("backend_config") or {}
    config |= {} if resolution is None else {"resolution": resolution}
    request = SamplingRequest(predictor, backend_config=config, **options)
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
