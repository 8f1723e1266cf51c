"""Where a reward's weights are, how they are read without running anything, and what to say when they cannot
be.
"""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from .base import RewardError

FOLDER = Path("weights")


def find_file(reward: str, path: str | None, file: str, repository: str | None) -> Path:
    """The weight file of a reward: the one named, else FOLDER/file, else the one in the hub cache; none:
    RewardError.

    `repository` is where the hub has it, if it does.
    """
    places, remedy = f"{FOLDER / file}", f"put {file}, from its authors, into {FOLDER}/"
    if repository is not None:
        places, remedy = (
            f"{places} or in the hub cache",
            f"run 'hf download {repository} {file} --local-dir {FOLDER}'",
        )
    if path is not None:
        if not Path(path).is_file():
            raise RewardError(
                f"reward {reward!r}: weights_path {path!r} is not a file; correct it, or {remedy} and leave"
                " it out"
            )
        return Path(path)
    if (FOLDER / file).is_file():
        return FOLDER / file
    cached = None if repository is None else try_to_load_from_cache(repository, file)
    if not isinstance(cached, str):
        raise RewardError(f"reward {reward!r}: no weights at {places}; {remedy}, or set weights_path")
    return Path(cached)


def find_folder(where: str, file: str = "config.json") -> Path | None:
    """The folder, local or in the hub cache, of a model that has `file`; None if there is none."""
    if (Path(where) / file).is_file():
        return Path(where)
    try:
        cached = try_to_load_from_cache(where, file)
    except HFValidationError:  # not a name that a repository can have
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def check_folder(reward: str, where: str, file: str = "config.json") -> list[str]:
    """What will be fetched for a model, in words; a model that is nowhere and cannot be fetched:
    RewardError.
    """
    if find_folder(where, file) is not None:
        return []
    if Path(where).is_dir():
        raise RewardError(
            f"reward {reward!r}: folder {where!r} has no {file}; name a folder as transformers saves it"
        )
    if is_offline_mode() or where.count("/") > 1 or where.startswith((".", "/", "~")):
        raise RewardError(
            f"reward {reward!r}: {where!r} is neither a folder nor in the hub cache; run 'hf download"
            f" {where}', or name a local folder"
        )
    return [f"reward {reward!r}: {where} is not in the hub cache and will be fetched"]


def weight_files(where: str) -> list[Path]:
    """The weights that transformers reads for a model: its safetensors files, else its older ones."""
    folder = find_folder(where)
    if folder is None:
        return []
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def read_checkpoint(reward: str, path: Path) -> dict[str, Any]:
    """The dictionary in a torch file, of tensors and plain containers only; anything else: RewardError."""
    with wrap_errors(reward, not_fitting(path)):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, expected a dictionary")
        return found


def load_weights(
    reward: str, path: Path, module: nn.Module, state: Mapping[str, Tensor], assign: bool = False
) -> None:
    """Load the tensors of a file into a module, strictly; one lacking, left over or of another shape:
    RewardError.
    """
    with wrap_errors(reward, not_fitting(path)):
        module.load_state_dict(state, strict=True, assign=assign)


def build_with_weights(
    reward: str, path: Path, build: Callable[[], nn.Module], state: Mapping[str, Tensor]
) -> nn.Module:
    """The module that `build` makes, with the tensors of a file, in float32, frozen; nothing is initialised
    on the way.
    """
    with torch.device("meta"):
        module = build()
    load_weights(reward, path, module, state, assign=True)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name == "position_ids":  # made by the constructor, and in no file
                part.position_ids = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    return module.float().requires_grad_(False).eval()


@contextmanager
def wrap_errors(reward: str, said: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a RewardError that says this, and why."""
    try:
        yield
    except Exception as error:  # what the libraries raise for a broken file has no common type
        reason = re.sub(r"https?://\S+", "the hub", " ".join(str(error).split()))[:240]
        raise RewardError(f"reward {reward!r}: {said} ({type(error).__name__}: {reason})") from error


def not_fitting(path: Path) -> str:
    """What is said of a file that does not hold what a reward needs."""
    return f"{path} does not hold the weights it needs; download it again, or name another file"


def unusable(where: str, what: str) -> str:
    """What is said of a folder, or a name on the hub, that does not hold what a reward needs."""
    return f"{where!r} is not {what} that can be loaded; run 'hf download {where}', or name another folder"
