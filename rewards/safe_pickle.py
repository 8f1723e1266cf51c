"""Read the tensors of a pickled torch module without running any of its code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


class Inert:
    """Stands in for a class or function of a pickle: takes any arguments and does nothing with them."""

    def __new__(cls, *arguments: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: object):
        pass


def read_module_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name of a whole module saved with torch.save; no module there: ValueError.

    Every class that the file names, but for tensors and containers, becomes an inert stand-in; none is
    imported, none is called. A file that is no zip archive, or that a limited unpickler refuses even so,
    raises what torch raises.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(Inert, name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(found, Inert):
        raise ValueError(f"it holds a {type(found).__name__}, expected a whole module")
    return dict(walk(vars(found), ""))


def walk(module: Mapping, prefix: str) -> list[tuple[str, Tensor]]:
    """The named tensors of a module's attributes, its own first."""
    own = {**module["_parameters"], **module["_buffers"]}
    found = [(prefix + name, tensor) for name, tensor in own.items() if tensor is not None]
    for name, child in module["_modules"].items():
        if child is not None:
            found += walk(vars(child), f"{prefix}{name}.")
    return found
