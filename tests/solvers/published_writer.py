"""Writes predictors in the published pickle layout, from real torch objects, and pickles that attack their
reader.
"""

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import solvers
from solvers import PredictorError, load_predictor

SOURCE = "raise RuntimeError('the source inside a predictor must never run')\n"
SAMPLERS = ("epd_sampler", "ipndm_sampler", "heun_sampler", "dpm_sampler")
PARAMETERS = ("r_params", "scale_dir_params", "scale_time_params", "weight_s")

# the attributes after those of a torch module, in the order of the published files
ATTRIBUTES = {
    "dataset_name": "ms_coco",
    "img_resolution": 512,
    "num_steps": None,
    "sampler_stu": "epd",
    "sampler_tea": "dpm",
    "M": 1,
    "guidance_type": "cfg",
    "guidance_rate": 7.5,
    "schedule_type": "discrete",
    "schedule_rho": 1.0,
    "afs": False,
    "scale_dir": 0.0,
    "scale_time": 0.0,
    "max_order": 2,
    "predict_x0": False,
    "lower_order_final": True,
    "num_points": None,
    "fcn": False,
    "alpha": 10.0,
    "backend": "ldm",
    "backend_config": {"resolution": 512},
    "_init_args": (),
    "_init_kwargs": {},
    "sigma_min": 0.03,
    "sigma_max": 14.6,
    "flowmatch_mu": None,
    "flowmatch_shift": None,
}
LATER = ("sigma_min", "sigma_max", "flowmatch_mu", "flowmatch_shift")  # missing in older files
BACKEND = ("backend", "backend_config")  # missing in the files of the first paper


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """What unpickling without care runs: the source that comes with the object."""
    exec(meta["module_src"], {})
    return meta["state"]


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class WithSource:
    """An object that is pickled with the source of its class."""

    class_name = "EPD_predictor"
    source = SOURCE

    def __reduce_ex__(self, protocol):
        state = {k: v for k, v in vars(self).items() if k != "source"}
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": state,
        }
        return _reconstruct_persistent_obj, (meta,)


class PublishedPredictor(WithSource, nn.Module):
    """The four raw arrays [N, K] (standard normal where not given), and the attributes; `drop` leaves some
    out.
    """

    def __init__(
        self, raw: dict[str, Tensor], drop: tuple[str, ...] = (), source: str = SOURCE, **attributes
    ):
        super().__init__()
        shape = next(iter(raw.values())).shape
        generator = torch.Generator().manual_seed(0)
        for name in PARAMETERS:
            setattr(self, name, nn.Parameter(raw.get(name, torch.randn(shape, generator=generator))))
        self.sigmoid = nn.Sigmoid()
        self.softmax = nn.Softmax(dim=-1)
        self.source = source
        known = ATTRIBUTES | {"num_steps": shape[0] + 1, "num_points": shape[1]} | attributes
        vars(self).update({k: v for k, v in known.items() if k not in drop})
        vars(self)["_init_kwargs"] = {k: v for k, v in attributes.items() if k not in drop}


class PublishedLoss(WithSource):
    """A loss object as the first paper's files hold it: samplers by name, nodes and history on the GPU."""

    class_name = "EPD_loss"

    def __init__(self, source: str = SOURCE):
        self.source = source
        self.student_sampler, self.teacher_sampler = (
            solver_function("epd_sampler"),
            solver_function("heun_sampler"),
        )
        self.others = [solver_function("ipndm_sampler"), solver_function("dpm_sampler")]
        self.t_steps = torch.linspace(80.0, 0.002, 4)
        self.buffer_model = [torch.zeros(2, 3, 4, 4)]


_FUNCTIONS: dict[str, Callable] = {}


def solver_function(name: str) -> Callable:
    """A function that is pickled as solvers.<name>."""
    if name not in _FUNCTIONS:

        def function(*args):
            raise RuntimeError("a sampler inside a predictor must never run")

        function.__module__, function.__qualname__, function.__name__ = "solvers", name, name
        _FUNCTIONS[name] = function
    return _FUNCTIONS[name]


def storage_stream(storage: torch.TypedStorage, location: str = "cpu") -> bytes:
    """A storage as a legacy torch stream that records `location`."""
    file = io.BytesIO()
    torch.save(storage, file, _use_new_zipfile_serialization=False)
    here, there = (b"X" + len(s).to_bytes(4, "little") + s for s in (b"cpu", location.encode()))
    stream = file.getvalue()
    assert stream.count(here) == 1
    return stream.replace(here, there)


def floats(*numbers: float) -> bytes:
    """Numbers as the stream of a float storage."""
    return storage_stream(torch.tensor(numbers)._typed_storage())


class _Pickler(pickle.Pickler):
    """Pickles storages by `stream`, everything else as it pickles itself."""

    def __init__(self, file: io.BytesIO, stream: Callable[[torch.TypedStorage], bytes]):
        super().__init__(file, protocol=4)
        self.stream = stream

    def reducer_override(self, obj):
        if isinstance(obj, torch.TypedStorage):
            return torch.storage._load_from_bytes, (self.stream(obj),)
        return NotImplemented


@contextmanager
def published_modules() -> Iterator[None]:
    """The modules that the published files refer to are importable in here, and nowhere else."""
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    package.persistence = module
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    vars(solvers).update({name: solver_function(name) for name in SAMPLERS})
    try:
        yield
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]
        for name in SAMPLERS:
            del vars(solvers)[name]


def published_bytes(document: Any, stream: Callable[[torch.TypedStorage], bytes] = storage_stream) -> bytes:
    """The pickle of a published document, such as {"model": PublishedPredictor(...)}."""
    file = io.BytesIO()
    with published_modules():
        _Pickler(file, stream).dump(document)
    return file.getvalue()


def on_gpu(storage: torch.TypedStorage) -> bytes:
    """A storage as it is written on a machine with a GPU."""
    return storage_stream(storage, "cuda:0")


class _Globals(pickle.Unpickler):
    """Notes the globals that a pickle refers to; a thing that accepts everything takes their place."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self.names: set[str] = set()

    def find_class(self, module, name):
        self.names.add(f"{module}.{name}")
        return type(
            "Anything",
            (),
            {"__new__": lambda cls, *args: object.__new__(cls), "__setstate__": lambda self, state: None},
        )


def globals_of(content: bytes) -> set[str]:
    """The names of the globals in a pickle, without importing any."""
    unpickler = _Globals(content)
    unpickler.load()
    return unpickler.names


def write_published(path: Path, raw: dict[str, Tensor], stream=storage_stream, **options) -> Path:
    """A published predictor file; `options` as for PublishedPredictor."""
    path.write_bytes(published_bytes({"model": PublishedPredictor(raw, **options)}, stream))
    return path


# what a reader must do with any file


def refused(path: Path, content: bytes | None = None) -> str:
    """The one-line message with which a file is refused."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PredictorError) as caught:
        load_predictor(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    assert len(message) < 2500
    return message


def loads_or_refuses(path: Path, content: bytes) -> None:
    """A predictor that can run or a PredictorError, no third thing."""
    path.write_bytes(content)
    try:
        predictor = load_predictor(path)
    except PredictorError:
        refused(path)
    else:
        assert predictor.cost().evaluations > 0


def byte_changes(content: bytes) -> st.SearchStrategy:
    return st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)


def changed(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    result = bytearray(content)
    for place, byte in changes:
        result[place] = byte
    return bytes(result)


# pickles written opcode by opcode


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + len(content).to_bytes(4, "little") + content


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def global_line(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def beside_a_model(good: bytes, value: bytes) -> bytes:
    """The pickle of a document with `value` added to it, which a reader has no use for."""
    assert good[2:3] == b"\x95", "a frame, which would end too late"
    return good[:2] + good[11:-1] + text("loss_fn") + value + b"s."


def as_model(value: bytes) -> bytes:
    """The pickle of {"model": value}."""
    return b"\x80\x04}" + text("model") + value + b"s."


def call(function: bytes, argument: str) -> bytes:
    """function(argument), as REDUCE."""
    return function + text(argument) + b"\x85R"


REBUILD = stack_global("torch._utils", "_rebuild_parameter")
SIGMOID = stack_global("torch.nn.modules.activation", "Sigmoid")
ORDERED = stack_global("collections", "OrderedDict")


def unusual_opcodes(command: str) -> dict[str, bytes]:
    """Attempts to run a shell command, to change the reader or to leave the data behind, by name."""
    state = b"}" + text("_build") + text("x") + b"s"
    system = b"cos\nsystem\n"
    return {
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n",
        "obj": b"(" + system + b"S'" + command.encode() + b"'\no",
        "newobj of a function": REBUILD + text(command) + b"\x85\x81",
        "newobj of a class with arguments": SIGMOID + text(command) + b"\x85\x81",
        "newobj_ex": SIGMOID + b")}\x92",
        "ext1": b"\x82\x7f" + text(command) + b"\x85R",
        "ext2": b"\x83\x7f\x00" + text(command) + b"\x85R",
        "ext4": b"\x84\x7f\x00\x00\x00" + text(command) + b"\x85R",
        "persistent id": b"P" + command.encode() + b"\n",
        "binary persistent id": text(command) + b"Q",
        "state of a function": REBUILD + state + b"b",
        "slots of a function": REBUILD + b"N" + state + b"\x86b",
        "state of a class": SIGMOID + state + b"b",
        "slots of a class": SIGMOID + b"N" + state + b"\x86b",
        "state of OrderedDict": ORDERED + state + b"b",
        "slots of OrderedDict": ORDERED + b"N" + state + b"\x86b",
        "parameter of a string": REBUILD + text(command) + b"N}\x87R",
        "function called wrongly": stack_global("torch._utils", "_rebuild_tensor_v2") + b")R",
        "appended to a tensor": stack_global("torch.storage", "_load_from_bytes") + b"C\x00\x85RNa",
        "duplicate": b"]2a",
        "pop": b"NN0",
        "names that are no strings": b"NN\x93",
        "stack underflow": b"a",
    }


def bombs() -> dict[str, bytes]:
    """Pickles that are short, but would take much time, memory or stack, by name."""
    pairs, lists = b")", b"](K\x01K\x02e\x94"
    for i in range(31):  # a tuple of a pair of the same tuple, 31 times: as a key it is hashed 2^31 times
        pairs += b"\x94h" + bytes([i]) + b"\x86"
    for i in range(7):  # lists of ten times the same list: 10^7 numbers
        lists += b"](" + (b"h" + bytes([i])) * 10 + b"e\x94"
    # a frame of 2 bytes ends within the number after it; pickle then loses a byte and sees the bytes after CN
    # as opcodes
    hidden = (2).to_bytes(8, "little") + b"M\0\0CN" + b"]r\0\0\0\1".ljust(78, b"]") + b"."
    shared = b"}" + text("format") + text("epd-predictor/1") + b"s" + text("table") + b"}" + text("r")
    return {
        "memo index": b"\x80\x04]r\0\0\0\1.",
        "highest memo index": b"\x80\x04]r\xff\xff\xff\xff.",
        "memo index as text": b"\x80\x04]p999999999\n.",
        "get of nothing": b"\x80\x04j\xff\xff\xff\xff.",
        "long bytes": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",
        "bytes beyond all sizes": b"\x80\x04\x8e" + b"\xff" * 8 + b"x.",
        "hidden by a frame": b"\x80\x04\x95" + hidden,
        "4 GB of bytes": b"\x80\x04B\xff\xff\xff\xffx.",
        "long bytearray": b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b"x.",
        "long string": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
        "long frame": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        "frame beyond all sizes": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "long number": b"\x80\x04\x8b\xff\xff\xff\x7f\x01.",
        "negative length": b"\x80\x04\x8b\xff\xff\xff\xff\x01.",
        "deep lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep lists as a table": b"\x80\x04" + shared + b"]" * 5000 + b"a" * 4999 + b"ss.",
        "deep tuples as a key": b"\x80\x04})" + b"\x85" * 900_000 + b"Ns.",
        "deep marks": b"\x80\x04" + b"(" * 900_000 + b".",
        "many items": b"\x80\x04](" + b"}" * 6_000_000 + b"e.",
        "shared tuples as a key": b"\x80\x04}" + pairs + b"Ns.",
        "duplicated tuples as a key": b"\x80\x04})" + b"2\x86" * 31 + b"Ns.",
        "shared lists as a table": b"\x80\x04" + lists + shared + b"h\x07ss.",
        "a list within itself": b"\x80\x04" + shared + b"]\x94h\x00ass.",
        "protocol of the future": b"\x80\xffN.",
    }
