"""Unpickling that cannot run anything: every class of a file is refused or replaced by an inert stand-in."""

import io
import pickle
import pickletools
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

MAX_BYTES = 64 * 2**20
MAX_ITEMS = 10**6  # opcodes of a file, items that its content unfolds to
MAX_TUPLES = 10**4
# integers of more than 4 bytes: many can have one hash, and a dictionary of such keys takes quadratic time
MAX_LARGE = 1000
CREATE = {
    "EMPTY_LIST",
    "EMPTY_DICT",
    "EMPTY_SET",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "SHORT_BINBYTES",
    "BINBYTES",
    "BINBYTES8",
}
CREATE |= {"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ"}
NUMBERS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
FILL = {"MARK", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "BINPERSID"}
MEMO = {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
OPCODES = (
    CREATE | NUMBERS | TUPLES | FILL | MEMO | {"PROTO", "FRAME", "STOP"}
)  # all that pickling plain data, or tensors, writes
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
    """A predictor that cannot be found, read or used; the message is one printable line for the user."""


@dataclass(frozen=True, eq=False)
class Persistent:
    """Stands for an object of the published class with its own source code, of which only the state
    is kept.
    """

    meta: dict


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Stands for a tensor: the bytes of its storage (a legacy torch stream, not yet read), its offset and
    shape.
    """

    storage: "StoredBytes"
    offset: int
    shape: tuple
    stride: tuple


@dataclass(frozen=True, eq=False)
class StoredBytes:
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


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return tensor


def _inert_class(name: str) -> type:
    """A class whose objects swallow their state."""
    return type(name, (), {"__slots__": (), "__setstate__": lambda self, state: None})


def _stand_ins() -> dict[tuple[str, str], Any]:
    """The globals of the published files and what replaces each; made anew for every file."""
    table = {
        ("collections", "OrderedDict"): _Call(dict),
        ("torch._utils", "_rebuild_parameter"): _Call(_parameter),
        ("torch._utils", "_rebuild_tensor_v2"): _Call(
            lambda storage, offset, shape, stride, requires_grad, hooks, metadata=None: StoredTensor(
                storage, offset, shape, stride
            )
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
            raise PredictorError(
                f"refers to {module}.{name}, which no predictor needs; refused, nothing was run"
            )
        return self.stand_ins[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("unexpected persistent id")


def checked_load(unpickler: pickle.Unpickler, file: io.BytesIO) -> Any:
    """unpickler.load(), once a look at the opcodes has shown that it is short work."""
    start = file.tell()
    check_opcodes(file)
    file.seek(start)
    return unpickler.load()


def check_opcodes(file: io.BytesIO) -> None:
    """An error for opcodes that no predictor needs and for those that would take much time or memory.

    Frames hold whole opcodes, since pickle loses bytes at the end of others and would read on from elsewhere
    than here. The memo grows one by one. Tuples are few, since hashing nests as deep as they do, and are not
    taken from the memo: a tuple of tuples that are used twice takes exponential time to hash.
    """
    memo: list[bool] = []  # may this be used again?
    count = tuples = large = frame_end = 0
    previous = ""
    for opcode, value, position in pickletools.genops(file):
        name, end = opcode.name, file.tell()
        argument: Any = value
        start = position or 0
        count, tuples = count + 1, tuples + (name in TUPLES)
        if name not in OPCODES:
            raise pickle.UnpicklingError(f"unexpected {name}")
        if count > MAX_ITEMS or tuples > MAX_TUPLES:
            raise pickle.UnpicklingError(f"more than {MAX_ITEMS} opcodes or {MAX_TUPLES} tuples")
        large += name == "LONG1"
        if large > MAX_LARGE:
            raise pickle.UnpicklingError(f"more than {MAX_LARGE} integers of more than 4 bytes")
        if start < frame_end and (end > frame_end or name == "FRAME"):
            raise pickle.UnpicklingError("a frame that ends within an opcode")
        if name == "FRAME":
            frame_end = end + argument
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            index = len(memo) if name == "MEMOIZE" else argument
            if index > len(memo):
                raise pickle.UnpicklingError(f"unexpected memo index {index}")
            memo[index : index + 1] = [previous in CREATE]
        elif name in ("BINGET", "LONG_BINGET") and not (argument < len(memo) and memo[argument]):
            raise pickle.UnpicklingError(f"memo index {argument} cannot be used again")
        previous = name


def check_size(value: Any) -> None:
    """An error when value unfolds to too many items: lists within lists, each used many times, have
    exponentially many.
    """
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += 1
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
        if count + len(waiting) > MAX_ITEMS:
            raise PredictorError(f"more than {MAX_ITEMS} items")


def read_pickle(path: Path) -> tuple[Any, list[str]]:
    """The content of a pickle, and the classes it refers to; a foreign class or a malformed file:
    PredictorError.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise PredictorError(f"{path}: not a file; give a .pkl file")
        if info.st_size > MAX_BYTES:
            raise PredictorError(f"{path}: {info.st_size} bytes, more than any predictor has ({MAX_BYTES})")
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
