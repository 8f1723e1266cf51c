"""The runs of a backbone's evaluation: its learned tables, and baselines of the same cost."""

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
class SuiteRun:
    """The images of one solver: the name of its folder, its own arguments of sample.py, and the settings that
    its manifest will hold.
    """

    name: str
    arguments: tuple[str, ...]
    settings: dict


@dataclass(frozen=True)
class SuitePlan:
    """An evaluation, checked before anything is sampled; all runs are compared with the first."""

    outdir: Path
    runs: list[SuiteRun]
    shared: tuple[str, ...]
    """Arguments of sample.py that all runs have."""
    pairs: list[tuple[int, str]]
    """Seed and prompt of each image, by seed."""
    exps: list[Path]
    """Folders of the predictor files, and of those that they were learned from."""


@dataclass(frozen=True)
class LearnedTable:
    """A predictor to measure, what to call it, and the weights that are named for it."""

    label: str
    path: Path
    predictor: Predictor
    model: str | None

    def settings(self) -> dict:
        """What the manifest will say of guidance and backbone, as far as it is known before the weights
        load.
        """
        spec = self.predictor.spec
        model = self.model or spec.backend_config.get("model_name_or_path")
        known = spec.backend != "digits" and model is not None
        backbone = {"backbone": f"{spec.backend}: {model}"} if known else {}
        return backbone | ({} if spec.guidance_rate is None else {"guidance": spec.guidance_rate})

    def run(self) -> SuiteRun:
        """Its images."""
        cost = self.predictor.cost()
        settings = {
            "solver": "tableau" if isinstance(self.predictor.table, Tableau) else "epd",
            "predictor": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "depth": cost.depth,
            "evaluations": cost.evaluations,
            **self.settings(),
        }
        name = f"epd-{self.label.removeprefix('epd-')}-depth{cost.depth}-evals{cost.evaluations}"
        return SuiteRun(name, ("--predictor-path", str(self.path)), settings)

    def baseline(self, name: str, nodes: int) -> SuiteRun:
        """The images of a baseline with so many nodes, on its schedule and backbone."""
        cost = compile_tableau(BASELINES[name], torch.linspace(2, 1, nodes))
        settings = {
            "solver": name,
            "predictor": None,
            "depth": cost.depth,
            "evaluations": cost.evaluations,
            **self.settings(),
        }
        options = ("--predictor-path", str(self.path), "--solver", name, "--num-steps", str(nodes))
        return SuiteRun(f"{name}-depth{cost.depth}-evals{cost.evaluations}", options, settings)


def plan_suite(
    name: str, baselines: Sequence[str], batch: int | None, environment: Mapping[str, str]
) -> SuitePlan:
    """The evaluation of a preset, as the environment changes it; what cannot be done: UserError."""
    preset, settings = preset_of(name), variables(name, environment)
    for baseline in baselines:
        if baseline not in BASELINES:
            raise UserError(
                f"--baselines: {baseline!r} is no baseline, expected one or more of {', '.join(BASELINES)}"
            )
    prompts, file = prompts_of(preset, settings)
    text = settings.get("SEEDS", preset.seeds)
    seeds = parse_seeds(text, "SEEDS")
    model = settings.get("MODEL_ID")
    if model is None and preset.backend == "flux":
        model = environment.get("FLUX_MODEL_PATH")
    tables = []
    for label, place in predictors_of(preset, settings).items():
        path = resolve_predictor_path(place)
        tables.append(LearnedTable(label, path, load_predictor(path), model))
        check_made_for(preset, name, tables[-1])
    shared = ["--seeds", text, "--batch", str(batch or preset.batch)]
    shared += [] if file is None else ["--prompt-file", str(file)]
    shared += [] if model is None else ["--model-path", model]
    return SuitePlan(
        Path(settings.get("OUTDIR", f"samples/eval/{name}")),
        [*(table.run() for table in tables), *matched(tables, baselines)],
        tuple(shared),
        sorted((seed, prompts[seed % len(prompts)]) for seed in seeds),
        [*filter(Path.is_dir, [Path("exps")]), *sorted({table.path.parent for table in tables})],
    )


def matched(tables: Sequence[LearnedTable], baselines: Sequence[str]) -> list[SuiteRun]:
    """The images of each baseline at the serial depths and at the NFE of learned tables, each number of nodes
    once.
    """
    runs: dict[str, SuiteRun] = {}
    for name in baselines:
        for table in tables:
            cost = table.predictor.cost()
            for nodes in (
                num_steps_for_depth(BASELINES[name], cost.depth),
                num_steps_for_evaluations(BASELINES[name], cost.evaluations),
            ):
                run = table.baseline(name, nodes)
                runs.setdefault(run.name, run)
    return list(runs.values())


def preset_of(name: str) -> Preset:
    """The preset that a user names."""
    if name not in PRESETS:
        raise UserError(f"eval {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def variables(name: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables in the environment that count; for sd3-1024 SD3_1024_RUN_NAME goes before RUN_NAME."""
    prefix = name.upper().replace("-", "_")
    values = {key: environment.get(f"{prefix}_{key}") or environment.get(key) for key in VARIABLES}
    return {key: value for key, value in values.items() if value}


def prompts_of(preset: Preset, settings: Mapping[str, str]) -> tuple[list[str], Path | None]:
    """The prompts, and their file; the embedded digits have their own for want of one."""
    if "PROMPT_FILE" not in settings and preset.backend == "digits":
        return evaluation_prompts(len(ALL_LABELS)), None
    file = Path(settings.get("PROMPT_FILE", TEST))
    return read_prompts(file, "PROMPT_FILE"), file


def predictors_of(preset: Preset, settings: Mapping[str, str], exps: Path = Path("exps")) -> dict[str, str]:
    """The learned tables to measure by what to call them: PREDICTOR, else RUN_DIR, else the newest run
    RUN_NAME, else the preset's.
    """
    chosen = settings.get("PREDICTOR") or settings.get("RUN_DIR")
    if chosen is None and (run := settings.get("RUN_NAME")):
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


def check_made_for(preset: Preset, name: str, table: LearnedTable) -> None:
    """Refuse a predictor of another backbone or of unknown options; print its notices."""
    spec = table.predictor.spec
    check_backbone_known(spec, table.path)
    needed = {"backend": preset.backend} | preset.config
    recorded = {**spec.backend_config, "backend": spec.backend, "family": spec.family}
    for key, value in needed.items():
        if recorded.get(key, value) != value:
            raise UserError(
                f"{table.path} was made for {key} {recorded[key]}, but {name} needs {value}; give PREDICTOR"
                " one that was made for it"
            )
    check_backend(spec)
    for line in table.predictor.notices():
        note(f"{table.path}: {line}")
