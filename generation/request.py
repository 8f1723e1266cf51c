"""From a command line to a sampler: SamplingRequest (what is asked) -> ResolvedRequest (what is done) ->
Sampler.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from backends import check_backbone_known, check_backend
from backends.model_family import AUTO, family_of_model
from common.errors import UserError, note
from common.prompts import COCO, check_prompt, read_prompts
from solvers import (
    Predictor,
    Solver,
    Spec,
    Tableau,
    find_baseline,
    load_predictor,
    num_steps_for_depth,
    resolve_predictor_path,
)
from solvers.predictor.options import split_schedule_options

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
    resolution: int | str | None = None
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
        check_prompt(prompt, "--prompt")
        return prompt


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
    if request.backend == AUTO:
        request = with_family(request, Spec() if predictor is None else predictor.spec)
    request = replace(request, solver=ALIASES.get(request.solver, request.solver))
    if predictor is not None and (request.solver == "epd" or request.backend is None):
        check_backbone_known(predictor.spec, path)
    spec = merge_spec(request, Spec() if predictor is None else predictor.spec, path)
    if request.solver == "epd":
        resolved = resolve_learned(request, spec, predictor, path)
    else:
        spec = with_nodes(request, spec, predictor)
        resolved = ResolvedRequest(request, spec, request.solver, find_baseline(request.solver))
    check_backend(resolved.spec)
    return resolved


def with_family(request: SamplingRequest, recorded: Spec) -> SamplingRequest:
    """A request for --backend auto with the family of its model; without a model: UserError."""
    options, _ = split_schedule_options({**recorded.backend_config, **(request.backend_config or {})})
    model = request.model_path or options.get("model_name_or_path")
    if model is None:
        raise UserError("--backend auto finds the family of a model: give --model-path, or name the backbone")
    return replace(request, backend=family_of_model(model, options))


def merge_spec(request: SamplingRequest, recorded: Spec, path: Path | None) -> Spec:
    """One spec: the command line over what the predictor recorded; a contradiction is an error that names
    both.
    """
    options, schedule = split_schedule_options(request.backend_config or {})
    options |= {name: True for name in ("compile", "offload") if vars(request)[name]}
    if request.resolution is not None:
        options["resolution"] = request.resolution
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
    name = predictor.kind.solver_name
    notes = predictor.notices() + size_notes(predictor.spec, spec)
    return ResolvedRequest(request, spec, name, predictor.solver(), path, predictor.sigmas, fixed, notes)


def size_notes(recorded: Spec, spec: Spec) -> list[str]:
    """A note where a table is used at another resolution than it was learned at."""
    made, used = (s.backend_config.get("resolution") for s in (recorded, spec))
    if made in (None, used):
        return []
    return [f"learned at resolution {made}, used at {used}, whose nodes are the same"]


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
        return replace(spec, num_steps=num_steps_for_depth(find_baseline(name), depth, request.finish))
    if spec.num_steps is None:
        raise UserError(
            f"--solver {name} needs --num-steps N (number of nodes), or --steps-match with a --predictor-path"
        )
    return spec
