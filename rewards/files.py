"""Find a reward's weights and read them without running code; what is missing or broken: RewardError."""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from .base import RewardError

FOLDER = Path("weights")
Net = TypeVar("Net", bound=nn.Module)


def find_file(reward: str, path: str | None, file: str, repository: str | None) -> Path:
    """The weight file of a reward: the one named, else FOLDER/file, else the one in the hub cache.

    Args:
        reward: name of the reward, for messages.
        path: the file that the user named, if any.
        file: its published name.
        repository: where the hub has it, if it does.

    Raises:
        RewardError: there is none.
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
    """Check that a model is in a folder or the hub cache, or can be fetched.

    Returns:
        Notes for the user: what will be fetched.

    Raises:
        RewardError: it is neither here nor can it be fetched.
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
    with wrap_errors(reward, wrong_weights(path)):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, expected a dictionary")
        return content


def load_weights(
    reward: str, path: Path, module: nn.Module, state: Mapping[str, Tensor], assign: bool = False
) -> None:
    """load_state_dict, strictly: a tensor missing, left over or of another shape is a RewardError.

    Args:
        reward: name of the reward, for messages.
        path: the file that the tensors came from, for messages.
        module: gets the tensors.
        state: the tensors by name.
        assign: take the tensors themselves instead of copying their values.
    """
    with wrap_errors(reward, wrong_weights(path)):
        module.load_state_dict(state, strict=True, assign=assign)


def build_with_weights(reward: str, path: Path, build: Callable[[], Net], state: Mapping[str, Tensor]) -> Net:
    """A frozen module in float32 with the tensors of a file, without initialising it first.

    Args:
        reward: name of the reward, for messages.
        path: the file that the tensors came from, for messages.
        build: makes the module; called on the meta device.
        state: the tensors by name.

    Raises:
        RewardError: a tensor is missing, left over or of another shape.
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
def wrap_errors(reward: str, message: str) -> Iterator[None]:
    """Turn any error within into a RewardError of one line: the message, and the error in brackets."""
    try:
        yield
    except Exception as error:  # what the libraries raise for a broken file has no common type
        reason = re.sub(r"https?://\S+", "the hub", " ".join(str(error).split()))[:240]
        raise RewardError(f"reward {reward!r}: {message} ({type(error).__name__}: {reason})") from error


def wrong_weights(path: Path) -> str:
    """The message for a file that does not hold a reward's weights."""
    return f"{path} does not hold the weights it needs; download it again, or name another file"


def unusable_model(where: str, expected: str) -> str:
    """The message for a folder, or a name on the hub, that does not hold the expected model."""
    return (
        f"{where!r} is not {expected} that can be loaded; run 'hf download {where}', or name another folder"
    )
