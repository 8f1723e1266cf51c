"""The family of a model, from the pipeline class in its model_index.json: a folder's, or a hub id's."""

import json
from collections.abc import Mapping
from pathlib import Path

from .base import BackendError
from .model_ids import PIPELINES, SINGLE_FILES

AUTO = "auto"


def family_of_model(model: str, options: Mapping | None = None) -> str:
    """The name of the family whose pipeline class the model_index.json of a folder or hub id names.

    Args:
        model: folder or hub id of a diffusers pipeline.
        options: of the backbone, of which `revision` and `token` are used for a hub id.

    Raises:
        BackendError: a single file, no such model, or a class that is not supported.
    """
    path = Path(model).expanduser()
    if path.suffix in SINGLE_FILES:
        raise BackendError(f"model {model!r}: a single file does not name its family; {name_it()}")
    if path.is_dir():
        source, index = str(path / "model_index.json"), _local_index(path)
    else:
        source, index = f"model {model!r}: its model_index.json", _hub_index(model, options or {})
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise BackendError(f"{source}: expected JSON with _class_name, as save_pretrained writes it")
    if name not in PIPELINES:
        raise BackendError(
            f"{source}: class {name!r} is not supported, expected one of {', '.join(PIPELINES)}; a pipeline"
            " that calls scheduler.step takes a table as its scheduler: EPDScheduler, docs/diffusers.md"
        )
    return PIPELINES[name]


def name_it() -> str:
    """The remedy where a model does not name its family."""
    return f"name it with --backend {'|'.join(dict.fromkeys(PIPELINES.values()))}"


def _local_index(path: Path) -> dict:
    file = path / "model_index.json"
    if not file.is_file():
        raise BackendError(f"{path}: no folder with a model_index.json; {name_it()}")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    return index if isinstance(index, dict) else {}


def _hub_index(model: str, options: Mapping) -> dict:
    from . import quiet  # noqa: F401  isort: skip
    from diffusers import DiffusionPipeline  # isort: skip

    chosen = {key: options[key] for key in ("revision", "token") if options.get(key)}
    try:
        index = DiffusionPipeline.load_config(model, **chosen)
    except Exception as error:  # what the libraries raise for an id that cannot be reached has no common type
        reason = " ".join(str(error).split())[:200]
        raise BackendError(
            f"model {model!r} is neither a folder here nor a hub id whose model_index.json can be read"
            f" ({type(error).__name__}: {reason}); {name_it()}"
        ) from error
    return index if isinstance(index, dict) else {}
