"""The published predictor pickles, read as data: their embedded source is never looked at."""

import io
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from .options import map_published
from .safe_pickle import (
    MALFORMED,
    Persistent,
    PredictorError,
    SafeUnpickler,
    StoredBytes,
    StoredTensor,
    check_size,
    checked_load,
)

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DTYPES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64}
SPEC_KEYS = (
    "dataset_name",
    "backend",
    "backend_config",
    "num_steps",
    "num_points",
    "guidance_type",
    "guidance_rate",
    "schedule_type",
    "schedule_rho",
    "sigma_min",
    "sigma_max",
    "flowmatch_mu",
    "flowmatch_shift",
    "afs",
)
PROVENANCE_KEYS = (
    "sampler_stu",
    "sampler_tea",
    "M",
    "alpha",
    "img_resolution",
    "predict_x0",
    "lower_order_final",
    "fcn",
)


def read_published(document: Any) -> tuple[dict[str, Tensor], dict, dict, tuple[str, ...]]:
    """Table arrays, spec values, provenance and notes of a published predictor ({"model": ...}, anything
    beside it ignored).
    """
    model = document.get("model") if isinstance(document, dict) else None
    meta = model.meta if isinstance(model, Persistent) else None
    state = meta.get("state") if isinstance(meta, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("_parameters"), dict):
        raise PredictorError("neither a predictor of this project nor a published one (no model state)")
    student = state.get("sampler_stu") or "epd"
    if student not in ("epd", "ipndm"):
        raise PredictorError(f"sampler_stu is {brief(student)}, expected 'epd' or 'ipndm'")
    values = {k: state[k] for k in SPEC_KEYS if state.get(k) is not None}
    values["max_order"] = (state.get("max_order") or 4) if student == "ipndm" else 1
    provenance = {"format": "published"} | {k: state[k] for k in PROVENANCE_KEYS if state.get(k) is not None}
    check_size([values, provenance])
    values, notes = map_published(values, state.get("img_resolution"))
    return decode_table(state), values, provenance, notes


def decode_table(state: dict) -> dict[str, Tensor]:
    """r = sigmoid, w = softmax, scales = 2 h sigmoid(p / 2) + 1 - h for a half-range h > 0; `fcn` sets the
    last o to 1.
    """
    parameters = state["_parameters"]
    raw = {k: read_tensor(parameters.get(k), k) for k in ("r_params", "weight_s")}
    arrays = {"r": raw["r_params"].sigmoid(), "w": raw["weight_s"].softmax(-1)}
    for name in ("scale_dir", "scale_time"):
        half = state.get(name) or 0
        if not isinstance(half, int | float) or not 0 <= half <= 1:
            raise PredictorError(f"the half-range {name} is {brief(half)}, expected a number in [0, 1]")
        if half:
            arrays[name] = (
                2 * half * (read_tensor(parameters.get(f"{name}_params"), f"{name}_params") / 2).sigmoid()
                + 1
                - half
            )
    if state.get("fcn") and "scale_dir" in arrays:
        arrays["scale_dir"][-1] = 1
    return arrays


class _StorageUnpickler(SafeUnpickler):
    """Reads a legacy torch stream: knows storage classes by name and returns persistent ids as they are."""

    def __init__(self, file):
        super().__init__(file, {("torch", name): name for name in DTYPES})

    def persistent_load(self, pid):
        return pid


def read_tensor(stored: Any, name: str) -> Tensor:
    """A stored 2-D tensor in float64, from the raw little-endian numbers of its storage."""
    if not isinstance(stored, StoredTensor):
        raise PredictorError(f"parameter {name} is missing or not a tensor")
    if not isinstance(stored.storage, StoredBytes) or not isinstance(stored.storage.stream, bytes):
        raise PredictorError(f"parameter {name} has no storage")
    numbers = _read_storage(stored.storage.stream, name)
    shape, stride = stored.shape, stored.stride
    fits = all(
        isinstance(sizes, tuple) and len(sizes) == 2 and {type(n) for n in sizes} == {int}
        for sizes in (shape, stride)
    )
    if (
        not fits
        or stored.offset != 0
        or min(shape) < 1
        or stride != (shape[1], 1)
        or shape[0] * shape[1] != len(numbers)
    ):
        raise PredictorError(f"parameter {name} has an unexpected layout")
    return numbers.view(shape).double()


def _read_storage(stream: bytes, name: str) -> Tensor:
    file = io.BytesIO(stream)
    try:
        head = [checked_load(_StorageUnpickler(file), file) for _ in range(5)]
    except MALFORMED as error:
        raise PredictorError(f"parameter {name}: damaged storage ({error})") from None
    magic, protocol, _, pid, keys = head
    if magic != MAGIC or protocol != PROTOCOL:
        raise PredictorError(f"parameter {name}: not a torch storage")
    plain = (
        isinstance(pid, tuple)
        and len(pid) == 6
        and pid[0] == "storage"
        and isinstance(pid[1], str)
        and isinstance(pid[2], str)
    )
    if not plain or pid[1] not in DTYPES or pid[5] is not None or keys != [pid[2]]:
        raise PredictorError(f"parameter {name}: not a single plain storage of floats")
    dtype, count = DTYPES[pid[1]], int.from_bytes(file.read(8), "little")
    raw = file.read()
    if count != pid[4] or len(raw) != count * dtype.itemsize or not count:
        raise PredictorError(f"parameter {name}: {len(raw)} bytes of numbers, expected {count} numbers")
    return torch.frombuffer(bytearray(raw), dtype=dtype)
