"""What the evaluation of a backbone makes: images of its learned tables, and of baselines that cost
as much.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from backends import check_backbone_known, check_backend
from common.errors import note
from common.prompts import TEST, parse_seeds, read_prompts
from digits.data import ALL_LABELS, evaluation_prompts
from solvers import (
    BASELINES,
    Predictor,
    Tableau,
    UserError,
    compile_tableau,
    load_predictor,
    num_steps_for_depth,
    num_steps_for_evaluations,
    resolve_predictor_path,
    tables_in,
)

VARIABLES = ("PREDICTOR", "RUN_DIR", "RUN_NAME", "PROMPT_FILE", "SEEDS", "OUTDIR", "MODEL_ID")


@dataclass(frozen=True)
class Preset:
    """A backbone by the name that users know, with the learned tables that are measured by default."""

    backend: str
    config: dict
    folder: str
    """Of tables: the `tables` that it holds are measured, else the one that it stands for."""
    batch: int = 64
    metrics: str = "hps,clip"
    seeds: str = "0-149"
    tables: Mapping[str, str] = field(default_factory=lambda: {"best": "best", "distilled": "distilled"})
    """What to call the table of each kind."""


def digits(family: str, folder: str) -> Preset:
    """The preset of an embedded family: every digits prompt once, scored with the embedded metrics."""
    return Preset(
        "digits",
        {"family": family},
        folder,
        metrics="digits,judge",
        seeds=f"0-{len(ALL_LABELS) - 1}",
        tables={"distilled": "distilled", "best": "rdpo"},
    )


PRESETS = {
    "sd15": Preset("ldm", {}, "exps/sd15", batch=16),
    "sd3-512": Preset("sd3", {"resolution": 512}, "exps/sd3-512", batch=8),
    "sd3-1024": Preset("sd3", {"resolution": 1024}, "exps/sd3-1024", batch=4),
    "flux": Preset("flux", {"resolution": 1024}, "exps/flux", batch=1),
    "digits": digits("ldm", "exps/digits"),
    "digits-sd3": digits("sd3", "exps/digits-sd3"),
    "digits-flux": digits("flux", "exps/digits-flux"),
}


@dataclass(frozen=True)
class Part:
    """The images of one solver: what its folder is called, how sample.py is told, and what the manifest will
    say of it.
    """

    name: str
    arguments: tuple[str, ...]
    settings: dict


@dataclass(frozen=True)
class Plan:
    """An evaluation, found good before anything is sampled; the first part is what all others are compared
    with.
    """

    outdir: Path
    parts: list[Part]
    shared: tuple[str, ...]
    """Arguments of sample.py that all parts have."""
    pairs: list[tuple[int, str]]
    """Seed and prompt of each image, by seed."""
    exps: list[Path]
    """Where the predictor files are, and those that they were learned from."""


def make_plan(name: str, baselines: Sequence[str], batch: int | None, environment: Mapping[str, str]) -> Plan:
    """The evaluation of a preset, as the environment changes it; what cannot be done: UserError."""
    preset, told = preset_of(name), variables(name, environment)
    for baseline in baselines:
        if baseline not in BASELINES:
            raise UserError(
                f"--baselines: {baseline!r} is no baseline, expected one or more of {', '.join(BASELINES)}"
            )
    prompts, file = prompts_of(preset, told)
    text = told.get("SEEDS", preset.seeds)
    seeds = parse_seeds(text, "SEEDS")
    paths = {label: resolve_predictor_path(path) for label, path in predictors_of(preset, told).items()}
    predictors = {label: load_predictor(path) for label, path in paths.items()}
    for label, predictor in predictors.items():
        check_made_for(preset, name, predictor, paths[label])
        for line in predictor.notices():
            note(f"{paths[label]}: {line}")
    model = told.get("MODEL_ID") or (environment.get("FLUX_MODEL_PATH") if preset.backend == "flux" else None)
    shared = ["--seeds", text, "--batch", str(batch or preset.batch)]
    shared += [] if file is None else ["--prompt-file", str(file)]
    shared += [] if model is None else ["--model-path", model]
    return Plan(
        Path(told.get("OUTDIR", f"samples/eval/{name}")),
        [
            *(learned(label, paths[label], predictor, model) for label, predictor in predictors.items()),
            *matched(paths, predictors, baselines, model),
        ],
        tuple(shared),
        sorted((seed, prompts[seed % len(prompts)]) for seed in seeds),
        [*filter(Path.is_dir, [Path("exps")]), *sorted({path.parent for path in paths.values()})],
    )


def preset_of(name: str) -> Preset:
    """The preset that a user names."""
    if name not in PRESETS:
        raise UserError(f"eval {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def variables(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment says by variable; SD3_1024_RUN_NAME goes before RUN_NAME for sd3-1024."""
    prefix = name.upper().replace("-", "_")
    found = {key: environment.get(f"{prefix}_{key}") or environment.get(key) for key in VARIABLES}
    return {key: value for key, value in found.items() if value}


def prompts_of(preset: Preset, told: Mapping[str, str]) -> tuple[list[str], Path | None]:
    """The prompts, and their file; the embedded digits have their own for want of one."""
    if "PROMPT_FILE" not in told and preset.backend == "digits":
        return evaluation_prompts(len(ALL_LABELS)), None
    file = Path(told.get("PROMPT_FILE", TEST))
    return read_prompts(file, "PROMPT_FILE"), file


def predictors_of(preset: Preset, told: Mapping[str, str], exps: Path = Path("exps")) -> dict[str, str]:
    """The learned tables to measure by what to call them: PREDICTOR, else RUN_DIR, else the newest run
    RUN_NAME, else the preset's.
    """
    chosen = told.get("PREDICTOR") or told.get("RUN_DIR")
    if chosen is None and (run := told.get("RUN_NAME")):
        pattern = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(run)}(-\d+)?")
        runs = sorted(path for path in exps.glob("*") if pattern.fullmatch(path.name))
        if not runs:
            raise UserError(
                f"RUN_NAME {run!r}: no run folder {exps}/<date>-{run}; train one, or give PREDICTOR=FILE"
            )
        chosen = str(runs[-1])
    if chosen is not None:
        return {label_of(resolve_predictor_path(chosen)): chosen}
    tables = tables_in(Path(preset.folder), list(preset.tables))
    return {preset.tables[kind]: str(path) for kind, path in tables.items()} or {
        "start": str(resolve_predictor_path(preset.folder))
    }


def label_of(path: Path) -> str:
    """What to call a predictor: its file's name, or its run folder's where that is the same for all runs."""
    return next(
        name
        for name in (path.stem, *reversed(path.absolute().parts[:-1]))
        if not name.startswith(("network-snapshot", "export"))
    )


def check_made_for(preset: Preset, name: str, predictor: Predictor, path: Path) -> None:
    """Refuse a predictor of another backbone, or one that names an unknown option of it."""
    spec = predictor.spec
    check_backbone_known(spec, path)
    needed = {"backend": preset.backend} | preset.config
    recorded = {**spec.backend_config, "backend": spec.backend, "family": spec.family}
    for key, value in needed.items():
        if recorded.get(key, value) != value:
            raise UserError(
                f"{path} was made for {key} {recorded[key]}, but {name} needs {value}; give PREDICTOR one"
                " that was made for it"
            )
    check_backend(spec)


def common_settings(predictor: Predictor, model: str | None) -> dict:
    """What the manifest will say of guidance and backbone, as far as it is known before the weights load."""
    spec = predictor.spec
    model = model or spec.backend_config.get("model_name_or_path")
    backbone = {} if spec.backend == "digits" or model is None else {"backbone": f"{spec.backend}: {model}"}
    return backbone | ({} if spec.guidance_rate is None else {"guidance": spec.guidance_rate})


def learned(label: str, path: Path, predictor: Predictor, model: str | None) -> Part:
    """The images of a learned table."""
    cost = predictor.cost()
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    solver = "tableau" if isinstance(predictor.table, Tableau) else "epd"
    settings = {"solver": solver, "predictor": sha, "depth": cost.depth, "evaluations": cost.evaluations}
    settings |= common_settings(predictor, model)
    name = f"epd-{label.removeprefix('epd-')}-depth{cost.depth}-evals{cost.evaluations}"
    return Part(name, ("--predictor-path", str(path)), settings)


def matched(
    paths: Mapping[str, Path],
    predictors: Mapping[str, Predictor],
    baselines: Sequence[str],
    model: str | None,
) -> list[Part]:
    """The images of each baseline at the serial depths and at the total evaluations of learned tables, each
    number of nodes once.
    """
    parts: dict[str, Part] = {}
    for baseline in baselines:
        for label, predictor in predictors.items():
            solver, cost = BASELINES[baseline], predictor.cost()
            for nodes in (
                num_steps_for_depth(solver, cost.depth),
                num_steps_for_evaluations(solver, cost.evaluations),
            ):
                own = compile_tableau(solver, torch.linspace(2, 1, nodes))
                name = f"{baseline}-depth{own.depth}-evals{own.evaluations}"
                arguments = (
                    "--predictor-path",
                    str(paths[label]),
                    "--solver",
                    baseline,
                    "--num-steps",
                    str(nodes),
                )
                settings = {
                    "solver": baseline,
                    "predictor": None,
                    "depth": own.depth,
                    "evaluations": own.evaluations,
                }
                settings |= common_settings(predictor, model)
                parts.setdefault(name, Part(name, arguments, settings))
    return list(parts.values())
