"""Load a diffusers pipeline from a folder, a hub id or a single file, or say in a line what is missing."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import quiet  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline  # isort: skip
from huggingface_hub.errors import LocalEntryNotFoundError  # isort: skip
from .base import BackendError
from .model_ids import SINGLE_FILES


@dataclass(frozen=True)
class PipelineClass:
    """A diffusers class of pipelines, its title in messages, and whether nothing may be downloaded."""

    cls: type[DiffusionPipeline]
    title: str
    local_only: bool = False


def load_pipeline(
    wanted: PipelineClass, config: dict, dtype: torch.dtype, parts: dict[str, Any] | None = None
) -> DiffusionPipeline:
    """Load the pipeline of config["model_name_or_path"].

    Args:
        wanted: the class of the pipeline.
        config: the options of the backbone.
        dtype: number type of the weights.
        parts: networks and other parts that from_pretrained takes by name, None for those to leave out.

    Raises:
        BackendError: missing, gated or broken weights; the message has the remedy.
    """
    model = config["model_name_or_path"]
    looks_local = (
        model.endswith(SINGLE_FILES)
        or model.startswith((".", "/", "~"))
        or os.sep * 2 in model
        or model.count("/") > 1
    )
    path = Path(model).expanduser()
    if looks_local and not path.exists():
        raise BackendError(
            f"model {model!r} not found: expected a diffusers folder, a hub id, or a .safetensors/.ckpt file"
        )
    options = {k: config[k] for k in ("revision", "variant", "token") if config.get(k)}
    options |= {"dtype": dtype, **(parts or {}), **config.get("pipeline_kwargs", {})}
    try:
        if path.is_file():
            single = {"config": config["config"]} if config.get("config") else {}
            return wanted.cls.from_single_file(str(path), **single, **options)
        options |= {"use_safetensors": config["use_safetensors"]} if "use_safetensors" in config else {}
        options.setdefault("local_files_only", wanted.local_only)
        return wanted.cls.from_pretrained(str(path) if path.is_dir() else model, **options)
    except Exception as error:  # what the libraries raise for a broken file has no common type
        raise BackendError(missing_weights(wanted, model, path, error)) from error


def absent_parts(config: dict) -> dict[str, None]:
    """Parts that the folder's index lists as absent, which from_pretrained wants to be given as None."""
    index = Path(config["model_name_or_path"]).expanduser() / "model_index.json"
    try:
        parts = json.loads(index.read_text()) if index.is_file() else {}
    except ValueError:
        return {}  # from_pretrained reports what is wrong with it
    return {k: None for k, v in parts.items() if v == [None, None]} if isinstance(parts, dict) else {}


def missing_weights(wanted: PipelineClass, model: str, path: Path, error: Exception) -> str:
    """One line that names what could not be loaded and what provides it."""
    reason = " ".join(str(error).split())[:200]
    if path.exists():
        if isinstance(error, LocalEntryNotFoundError):
            return (
                f"model {model!r}: its configuration is not here and the hub is out of reach; name a folder"
                " in backend_config.config"
            )
        return (
            f"model {model!r} could not be loaded: expected {wanted.title} ({type(error).__name__}: {reason})"
        )
    is_offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    offline = "HF_HUB_OFFLINE is set; unset it, or " if is_offline else ""
    where = "in the local cache" if wanted.local_only else "available from the hub"
    return (
        f"model {model!r} is neither a folder here nor {where}: {offline}run "
        f"'hf download {model}' (after 'hf auth login' and accepting its licence if it is gated), "
        f"or give a local folder with --model_path ({type(error).__name__}: {reason})"
    )
