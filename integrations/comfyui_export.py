"""Tables as JSON for ComfyUI, and the node folder beside them in a ComfyUI installation."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from solvers import PredictorError

from .tables import load, table_data

NODE = Path(__file__).parent / "comfyui"
EXECUTOR = Path(__file__).parent / "k_diffusion" / "sample_epd.py"
NODE_FOLDER, TABLE_FOLDER = Path("custom_nodes") / "epd_solver", Path("models") / "epd_tables"


def export(predictors: Sequence[str], out: Path, config: dict | None) -> list[Path]:
    """Write predictors as tables for ComfyUI.

    Args:
        predictors: files, run folders or names under exps.
        out: a folder, or a ComfyUI installation: tables go to its models/epd_tables and the node with them.
        config: the scheduler configuration of the model, for predictors that record no nodes.
    Returns:
        The files of the tables.
    Raises:
        PredictorError: two predictors of one name, or one that cannot be read.
    """
    contents: dict[str, str] = {}
    for predictor in predictors:
        name = f"{table_name(load(predictor)[0])}.json"
        if name in contents:
            raise PredictorError(f"{predictor}: a second table of the name {name}; write them to two folders")
        contents[name] = json.dumps(table_data(predictor, config), indent=1) + "\n"
    folder = out / TABLE_FOLDER if (out / "custom_nodes").is_dir() else out
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    if folder != out:
        install_node(out / NODE_FOLDER)
    return [folder / name for name in contents]


def install_node(target: Path) -> None:
    """Copy the node folder with the executor that it needs; an older copy is replaced, file by file."""
    target.mkdir(parents=True, exist_ok=True)
    for source in [*sorted(NODE.glob("*.py")), *sorted(NODE.glob("*.json"))]:
        shutil.copyfile(EXECUTOR if source.name == EXECUTOR.name else source, target / source.name)


def table_name(file: Path) -> str:
    """epd-g7.5-d4 for .../epd-g7.5-d4/network-snapshot-export-best.pkl, sd15-start for sd15/start.pkl."""
    folder = file.absolute().parent
    folder = folder.parent if folder.name == "export" else folder
    if file.stem.startswith("network-snapshot"):
        return folder.name
    return f"{folder.name}-{file.stem}" if file.stem in ("best", "distilled", "start") else file.stem
