"""The 43 released predictors: their real metadata and numbers, written in their layout."""

import json
import sys
from pathlib import Path

import published_writer as writer
import torch
from published_writer import PublishedLoss, PublishedPredictor, published_bytes

TABLES: dict[str, dict] = json.loads((Path(__file__).parent / "released_tables.json").read_text())
TEXT_TO_IMAGE = [name for name, entry in TABLES.items() if "backend" in entry["metadata"]]
PIXELS = [name for name in TABLES if name not in TEXT_TO_IMAGE]
SOURCE = f"raise RuntimeError('never run')  {'#' * 3792}\n"  # as long as the real one


def interned(value):
    """The value with equal strings as one object: a pickle then writes each once, as those of a program's own
    strings.
    """
    if isinstance(value, dict):
        return {sys.intern(k): interned(v) for k, v in value.items()}
    return sys.intern(value) if isinstance(value, str) else value


def released_bytes(name: str) -> bytes:
    """The file of that name in the published repositories, with another source of the same length in it."""
    entry = TABLES[name]
    raw = {k: torch.tensor(v, dtype=torch.float32) for k, v in entry["raw"].items()}
    metadata = interned(entry["metadata"])
    drop = tuple(k for k in writer.ATTRIBUTES if k not in metadata and not k.startswith("_"))
    training = metadata.pop("training")
    model = PublishedPredictor(raw, drop=drop, source=SOURCE, **metadata)
    vars(model)["training"] = training
    vars(model)["_init_kwargs"] = interned(entry.get("init_kwargs", metadata))
    if name in TEXT_TO_IMAGE:
        return published_bytes({"model": model})
    return published_bytes({"model": model, "loss_fn": PublishedLoss()}, writer.on_gpu)


def write_released(folder: Path, names: list[str] | None = None) -> list[Path]:
    """Write released files under a folder, at their paths in the published repositories."""
    paths = []
    for name in TABLES if names is None else names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(released_bytes(name))
        paths.append(path)
    return paths
