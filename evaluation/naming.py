"""What people call the solvers and the backbones of image folders: "EPD distilled · depth 4 · 6 NFE"."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from solvers import Predictor, load_predictor

from .comparison import Run

SOLVERS = {
    "euler": "Euler",
    "heun": "Heun",
    "dpm2": "DPM-Solver-2",
    "dpm": "DPM-Solver, 3 stages",
    "ipndm2": "iPNDM-2",
    "ipndm3": "iPNDM-3",
    "ipndm": "iPNDM-4",
    "dpmpp": "DPM++ 2M",
    "dpmpp3": "DPM++ 3M",
    "unipc": "UniPC-2",
    "unipc3": "UniPC-3",
    "epd": "EPD",
    "tableau": "tableau",
}
STAGES = {"start": "start table", "distilled": "distilled", "rdpo": "RDPO"}
BACKBONES = {
    "ldm": "Stable Diffusion",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "chroma": "Chroma",
    "sana": "Sana",
    "aura_flow": "AuraFlow",
    "lumina2": "Lumina-Image 2.0",
    "digits": "digits",
}


def predictor_of(run: Run, predictors: Mapping[str, Path]) -> Predictor | None:
    """The learned solver that made a run, where its file is known."""
    path = predictors.get(run.settings.get("predictor") or "")
    return None if path is None else load_predictor(path)


def is_learned(run: Run) -> bool:
    """Whether a learned solver made the images."""
    return run.settings.get("predictor") is not None


def solver_name(run: Run, predictors: Mapping[str, Path]) -> str:
    """A solver without its cost: "DPM++ 2M", "EPD distilled"; the folder's name where no manifest says."""
    solver = run.settings.get("solver")
    if solver is None:
        return run.name
    name = SOLVERS.get(solver, solver)
    predictor = predictor_of(run, predictors)
    if predictor is None:
        return name
    if name == "EPD" and predictor.spec.max_order > 1:
        name = "EPD-Plugin"
    stage = "start" if predictor.is_start else str(predictor.provenance.get("kind"))
    return f"{name} {STAGES[stage]}" if stage in STAGES else name


def with_cost(name: str, run: Run) -> str:
    """A solver's name with the serial depth and the NFE of a run, where its manifest holds them."""
    settings = run.settings
    if "depth" not in settings:
        return name
    return f"{name} · depth {settings['depth']} · {settings['evaluations']} NFE"


def run_names(runs: Sequence[Run], predictors: Mapping[str, Path]) -> list[str]:
    """A name for each run of a family, no two alike: with the guidance where it differs, else the folder."""
    solvers = [solver_name(run, predictors) for run in runs]
    names = [with_cost(solver, run) for solver, run in zip(solvers, runs, strict=True)]
    if len({run.settings.get("guidance") for run in runs}) > 1:
        scales = [run.settings.get("guidance") for run in runs]
        names = [
            name if scale is None else f"{name} · guidance {scale:g}"
            for name, scale in zip(names, scales, strict=True)
        ]
    count = Counter(names)
    return [
        f"{name} ({run.name})" if count[name] > 1 and name != run.name else name
        for name, run in zip(names, runs, strict=True)
    ]


def family_name(runs: Sequence[Run], predictors: Mapping[str, Path]) -> str:
    """What to call the backbone that made some runs, such as "Digits · FLUX.1 layout"."""
    backbone = runs[0].settings.get("backbone")
    if backbone is None:
        return "Images without a manifest"
    kind, _, identity = backbone.partition(": ")
    if kind != "digits":
        model = identity.rstrip("/").rpartition("/")[2]
        return f"{BACKBONES.get(kind, kind)} ({model})" if model else BACKBONES.get(kind, kind)
    known = [p.spec.family for run in runs if (p := predictor_of(run, predictors)) is not None]
    return f"Digits · {BACKBONES.get(known[0] or '', 'own')} layout" if known else "Digits"
