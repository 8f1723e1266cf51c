"""From a command line to a sampler: SamplingRequest (what is asked) -> ResolvedRequest (what is done) ->
Sampler.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from backends import check_backbone_known, check_backend, load_backend
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks
from common.errors import UserError, note
from solvers import (
    BASELINES,
    Predictor,
    Solver,
    Spec,
    Tableau,
    baseline_of,
    load_predictor,
    num_steps_for_depth,
    resolve_predictor_path,
)
from solvers.predictor.options import split_schedule_options

from .sampler import Sampler

ALIASES = {"ddim": "euler", "epd_parallel": "epd"}
LABELS = {  # the options that name a field of the spec
    "backend": "--backend",
    "schedule_type": "--schedule",
    "num_steps": "--num-steps",
    "backend_config.family": "family",
    "backend_config.resolution": "resolution",
}


@dataclass(frozen=True)
class SamplingRequest:
    """The options of a sampling command; None leaves the choice to the predictor or the backbone."""

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


@dataclass(frozen=True)
class ResolvedRequest:
    """What a request comes to: one spec, the solver, and the predictor with its file where one is used."""

    request: SamplingRequest
    spec: Spec
    name: str
    solver: Solver
    path: Path | None = None
    sigmas: Tensor | None = None
    checks_nodes: bool = False
    """Whether the recorded nodes should be those of the schedule (they are neither learned nor a
    tableau's).
    """
    notes: list[str] = field(default_factory=list)


def resolve(request: SamplingRequest) -> ResolvedRequest:
    """Resolve a request; every contradiction is an error here, before any weights load."""
    path = None if request.predictor_path is None else resolve_predictor_path(request.predictor_path)
    predictor = None if path is None else load_predictor(path)
    request = replace(request, solver=ALIASES.get(request.solver, request.solver))
    if predictor is not None and (request.solver == "epd" or request.backend is None):
        check_backbone_known(predictor.spec, path)
    spec = merge_spec(request, Spec() if predictor is None else predictor.spec, path)
    if request.solver == "epd":
        resolved = resolve_learned(request, spec, predictor, path)
    else:
        spec = with_nodes(request, spec, predictor)
        resolved = ResolvedRequest(request, spec, request.solver, BASELINES[request.solver])
    check_backend(resolved.spec)
    return resolved


def merge_spec(request: SamplingRequest, recorded: Spec, path: Path | None) -> Spec:
    """One spec: the command line over what the predictor recorded; a contradiction is an error that names
    both.
    """
    options, schedule = split_schedule_options(request.backend_config or {})
    options |= {name: True for name in ("compile", "offload") if vars(request)[name]}
    if request.model_path is not None:
        options["model_name_or_path"] = request.model_path
    asked = schedule | {
        "backend": request.backend,
        "backend_config": options,
        "num_steps": request.num_steps,
        "schedule_type": request.schedule,
    }
    if request.solver == "epd":
        spec = recorded.merged(asked, path, LABELS)
    else:  # a baseline runs on nodes of its own, and on another backbone has nothing of the predictor's
        spec = (recorded if request.backend in (None, recorded.backend) else Spec()).overridden(asked)
    guidance = spec.guidance_rate if request.guidance is None else request.guidance
    backend = spec.backend or ("digits" if path is None else None)
    return replace(spec, guidance_rate=guidance, backend=backend)


def resolve_learned(
    request: SamplingRequest, spec: Spec, predictor: Predictor | None, path: Path | None
) -> ResolvedRequest:
    """The request with the solver that its predictor describes."""
    if predictor is None:
        raise UserError(
            "--solver epd needs a learned table: give --predictor-path (such as exps/digits), or another"
            " --solver"
        )
    if request.steps_match:
        raise UserError("--steps-match fits a baseline to the predictor; choose a --solver other than epd")
    whole = isinstance(predictor.table, Tableau)
    fixed = predictor.sigmas is not None and not whole and not predictor.provenance.get("learned_sigmas")
    name = "tableau" if whole else "epd"
    notes = predictor.notices()
    return ResolvedRequest(request, spec, name, predictor.solver(), path, predictor.sigmas, fixed, notes)


def with_nodes(request: SamplingRequest, spec: Spec, predictor: Predictor | None) -> Spec:
    """The spec of a baseline with the number of nodes that --steps-match asks for, or that was given."""
    name = request.solver
    if request.steps_match:
        if predictor is None or request.num_steps is not None:
            raise UserError(
                "--steps-match takes the serial depth of a predictor: give --predictor-path, and no"
                " --num-steps"
            )
        depth = predictor.cost(request.finish).depth
        return replace(spec, num_steps=num_steps_for_depth(BASELINES[name], depth, request.finish))
    if spec.num_steps is None:
        raise UserError(
            f"--solver {name} needs --num-steps N (number of nodes), or --steps-match with a --predictor-path"
        )
    return spec


def make_sampler(resolved: ResolvedRequest, ranks: Ranks) -> Sampler:
    """Load the backbone of a resolved request and put its solver on the nodes."""
    spec, request = resolved.spec, resolved.request
    backend = load_backend(spec, ranks.device, None if request.dtype == "auto" else request.dtype)
    sigmas = backend.sigmas(spec) if resolved.sigmas is None else resolved.sigmas
    if resolved.checks_nodes and (text := backend.nodes_note(spec, sigmas)):
        note(text)
    guidance = backend.default_guidance if spec.guidance_rate is None else spec.guidance_rate
    solver = baseline_of(resolved.name, backend.flow) if resolved.name in BASELINES else resolved.solver
    sampler = Sampler(backend, solver, resolved.name, sigmas, guidance, request.finish, resolved.path)
    return sampler if request.parallel == "images" else divide_points(sampler, request.parallel, ranks)


def divide_points(sampler: Sampler, parallel: str, ranks: Ranks) -> Sampler:
    """The sampler whose points, and with "points-cfg" CFG branches, are divided among the ranks."""
    branches = sampler.cfg_rows if parallel == "points-cfg" else 1
    tasks = branches * max(len(level) for level in sampler.cost.levels)
    useful = -(
        -tasks // -(-tasks // ranks.world)
    )  # each rank takes as many as the busiest, until none is left
    if ranks.world == 1:
        note(f"--parallel {parallel} has one process: start up to {tasks} with torchrun")
    elif ranks.world > useful:
        note(f"--parallel {parallel} gives work to {useful} of {ranks.world} processes: start {useful}")
    return replace(sampler, evaluator=ParallelEvaluator(ranks if ranks.world > 1 else None, branches == 2))
