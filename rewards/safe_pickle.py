"""Read the tensors of a pickled torch module without running any of its code."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Stub:
    """In place of a class or function that a pickle names: takes any arguments and does nothing with them."""

    def __new__(cls, *arguments: object) -> "Stub":
        return super().__new__(cls)

    def __init__(self, *arguments: object):
        pass


def read_module_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name of a whole module saved with torch.save.

    Every class that the file names, but for tensors and containers, becomes a stub; none is imported, none is
    called.

    Raises:
        ValueError: the file holds no module.
        Exception: what torch raises for a file that is no zip archive, or that its limited unpickler refuses.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stubs: list[Callable | tuple[Callable, str]] = [(Stub, name) for name in names]
    with torch.serialization.safe_globals(stubs):
        module = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(module, Stub):
        raise ValueError(f"it holds a {type(module).__name__}, expected a whole module")
    return dict(named_tensors(vars(module), ""))


def named_tensors(module: Mapping, prefix: str) -> list[tuple[str, Tensor]]:
    """The parameters and buffers among a module's attributes by name, its own first."""
    own = {**module["_parameters"], **module["_buffers"]}
    tensors = [(prefix + name, tensor) for name, tensor in own.items() if tensor is not None]
    for name, child in module["_modules"].items():
        if child is not None:
            tensors += named_tensors(vars(child), f"{prefix}{name}.")
    return tensors
