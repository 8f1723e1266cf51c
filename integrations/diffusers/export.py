"""A learned table as a folder that diffusers loads: a scheduler or a whole pipeline, with a model card."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import printable
from solvers import PredictorError

from ..tables import read_json, scheduler_config
from . import epd_scheduler
from .epd_scheduler import EPDScheduler

SOURCE = Path(epd_scheduler.__file__)
MODULE, CLASS = SOURCE.stem, EPDScheduler.__name__


def export(predictors: Sequence[str], model: Path, out: Path, pipeline: bool) -> EPDScheduler:
    """Write predictors as a scheduler folder, or as a copy of a pipeline folder with that scheduler.

    Args:
        predictors: files, run folders or names under exps, of different numbers of network calls.
        model: the diffusers folder of the pipeline that will use them; its scheduler has the noise schedule.
        out: the folder to write, which must not exist.
        pipeline: copy the whole model; else the scheduler alone.
    Returns:
        The scheduler.
    Raises:
        PredictorError: `out` exists, `model` is no pipeline folder, or a predictor does not fit it.
    """
    if out.exists():
        raise PredictorError(f"{out} exists; give a folder that does not")
    config = scheduler_config(model)
    index = read_json(model / "model_index.json", "a diffusers pipeline folder")
    scheduler = EPDScheduler.from_predictor(*predictors, config=config)
    folder = out / "scheduler" if pipeline else out
    if pipeline:
        shutil.copytree(
            model, out, ignore=lambda path, names: {"scheduler"} if Path(path) == model else set()
        )
        index["scheduler"] = [MODULE, CLASS]
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    scheduler.save_pretrained(folder)
    shutil.copyfile(SOURCE, folder / SOURCE.name)
    card = model_card(scheduler, index.get("_class_name", "DiffusionPipeline"), model, pipeline)
    (out / "README.md").write_text(card, encoding="utf-8")
    return scheduler


COLUMNS = {
    "num_inference_steps": "calls",
    "serial depth": "depth",
    "guidance": "guidance",
    "resolution": "resolution",
    "kind": "kind",
    "error (RMSE to the teacher, held out)": "heldout_rmse",
}
FIT = """A table fits the model, the guidance scale and the resolution that it was made for; the scheduler
cannot check them. `num_inference_steps` counts network calls one after another. With
`enable_parallel_points(pipe)` of the EPD-Solver repository, the points of a level go into one call and it
counts the serial depth."""


def model_card(scheduler: EPDScheduler, pipeline_class: str, model: Path, whole: bool) -> str:
    """The README of a folder: what its tables were made for, their cost and error, and how to use them."""
    entries = [entry for _, entry in sorted(scheduler.config.made_for.items(), key=lambda item: int(item[0]))]
    bases = sorted({entry["base_model"] for entry in entries if "base_model" in entry})
    teachers = sorted({str(entry["teacher"]) for entry in entries if "teacher" in entry})
    names = ", ".join(map(printable, bases)) or f"the model in {printable(model.name)}"
    lines = ["---", "library_name: diffusers", "tags:", "- diffusers", "- epd-solver"]
    lines += ["base_model:", *(f"- {json.dumps(printable(base))}" for base in bases)] if bases else []
    lines += ["---", "", "# Learned sampler tables (EPD-Solver)", ""]
    lines += [f"Made for {names}, in `{printable(pipeline_class)}`. {FIT}", ""]
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [[cell(entry.get(key)) for key in COLUMNS.values()] for entry in entries]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"Teacher: {'; '.join(map(printable, teachers))}."] if teachers else []
    return "\n".join([*lines, "", "```python", *usage(whole, pipeline_class, entries[0]), "```", ""])


def usage(whole: bool, pipeline_class: str, entry: dict[str, Any]) -> list[str]:
    """The shortest script that makes an image, at the guidance scale that the table was made for."""
    guidance = f", guidance_scale={entry['guidance']:g}" if "guidance" in entry else ""
    call = f'pipe("a prompt", num_inference_steps={entry["calls"]}{guidance}).images[0].save("image.png")'
    if whole:
        return [
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
            call,
        ]
    return [
        f"from diffusers import {pipeline_class}",
        f"from {MODULE} import {CLASS}  # {SOURCE.name} lies beside this file",
        "",
        f'pipe = {pipeline_class}.from_pretrained("BASE_MODEL")',
        f'pipe.scheduler = {CLASS}.from_pretrained("THIS_FOLDER")',
        call,
    ]


def cell(value: Any) -> str:
    """A value of the card's table; what a predictor does not record is said to be so."""
    if value is None:
        return "not recorded"
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    return text.replace("|", "\\|")
