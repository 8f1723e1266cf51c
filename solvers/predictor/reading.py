"""Unpickling that cannot run anything: every class of a file is refused or replaced by an inert stand-in."""

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

MAX_BYTES = 64 * 2**20
MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class PredictorError(UserError):
    """A predictor that cannot be found, read or used; the message is one line for the user."""


class Persistent(NamedTuple):
    """Stands for an object of the published class with its own source code, of which only the state is kept."""

    meta: dict


class StoredTensor(NamedTuple):
    """Stands for a tensor: the bytes of its storage (a legacy torch stream, not yet read), its offset and shape."""

    storage: "StoredBytes"
    offset: int
    shape: tuple
    stride: tuple


class StoredBytes(NamedTuple):
    """Stands for a storage, whatever device it was on."""

    stream: bytes


class _Call:
    """A stand-in for a function: calls `build`, holds no state and takes none."""

    __slots__ = ("_build",)

    def __init__(self, build):
        self._build = build

    def __call__(self, *args):
        return self._build(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function has no state")


def _inert_class(name: str) -> type:
    """A class whose objects swallow their state."""
    return type(name, (), {"__slots__": (), "__setstate__": lambda self, state: None})


def _stand_ins() -> dict[tuple[str, str], Any]:
    """The globals of the published files and what replaces each; made anew for every file."""
    table = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_parameter"): _Call(lambda tensor, requires_grad, hooks: tensor),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(
            lambda storage, offset, shape, stride, requires_grad, hooks, metadata=None: StoredTensor(storage, offset, shape, stride)
        ),
        ("torch.storage", "_load_from_bytes"): _Call(StoredBytes),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Call(Persistent),
        ("torch.nn.modules.activation", "Sigmoid"): _inert_class("Sigmoid"),
        ("torch.nn.modules.activation", "Softmax"): _inert_class("Softmax"),
    }
    for name in ("epd", "ipndm", "heun", "dpm", "euler", "dpmpp"):  # attributes of a stored loss object
        table["solvers", f"{name}_sampler"] = _inert_class(name)
    return table


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that knows the given globals only and refuses every other, naming it."""

    def __init__(self, file: io.BytesIO, stand_ins: dict[tuple[str, str], Any]):
        super().__init__(file)
        self.stand_ins = stand_ins
        self.foreign: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        self.foreign.append(f"{module}.{name}")
        if (module, name) not in self.stand_ins:
            raise PredictorError(f"refers to {module}.{name}, which no predictor needs; refused, nothing was run")
        return self.stand_ins[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("unexpected persistent id")


def checked_load(unpickler: pickle.Unpickler, file: io.BytesIO) -> Any:
    """unpickler.load(), once a look at its opcodes has shown that it cannot exhaust memory or use the extension registry."""
    start = file.tell()
    size = len(file.getbuffer())
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.startswith("EXT") or ("PUT" in opcode.name and int(argument) > size):
            raise pickle.UnpicklingError(f"unexpected {opcode.name}")
    file.seek(start)
    return unpickler.load()


def read_pickle(path: Path) -> tuple[Any, list[str]]:
    """The content of a pickle, and the classes it refers to; a foreign class or a malformed file: PredictorError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PredictorError(f"{path}: {path.stat().st_size} bytes, more than any predictor has ({MAX_BYTES})")
        content = path.read_bytes()
    except OSError as error:
        raise PredictorError(f"{path}: cannot be read ({error.strerror})") from None
    if not content:
        raise PredictorError(f"{path}: the file is empty")
    file = io.BytesIO(content)
    unpickler = SafeUnpickler(file, _stand_ins())
    try:
        return checked_load(unpickler, file), unpickler.foreign
    except PredictorError as error:
        raise PredictorError(f"{path}: {error}") from None
    except MALFORMED as error:
        raise PredictorError(f"{path}: not a predictor file, or a damaged one ({error})") from None
