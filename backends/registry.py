"""The backbones by name. A family is one module that exports FAMILY and one line of MODULES."""

from importlib import import_module

import torch

from common.plugins import is_code, load_code
from solvers import Spec

from .base import Backend, BackendError
from .family import Family

MODULES = {
    "ldm": "backends.ldm",
    "sdxl": "backends.sdxl",
    "sd3": "backends.sd3",
    "flux": "backends.flux",
    "chroma": "backends.flow.chroma",
    "sana": "backends.flow.sana",
    "aura_flow": "backends.flow.aura_flow",
    "lumina2": "backends.flow.lumina2",
    "gaussian": "backends.gaussian",
}
"""Imported when the family is first asked for: a name costs nothing."""
FAMILIES = ("ldm", "sd3", "flux")
"""That the digits come in."""
NAMES = ("digits", *MODULES)
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def find_family(name: str | None) -> Family:
    """The family of a name, or of my_module:FAMILY where the user gave that; an unknown name:
    BackendError.
    """
    if name is None:
        raise BackendError(f"the backbone is not named: expected one of {', '.join(NAMES)}")
    if is_code(name):
        return load_code(name, "--backend", Family)
    if name not in MODULES:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    return import_module(MODULES[name]).FAMILY


def check_backend(spec: Spec) -> tuple[Family, dict]:
    """The family of a spec's backbone and its options, checked without loading weights; else BackendError."""
    config = {k: v for k, v in spec.backend_config.items() if v is not None}
    if spec.backend == "digits":
        return check_digits(config)
    family = find_family(spec.backend)
    family.check_options(config)
    return family, config


def check_digits(config: dict) -> tuple[Family, dict]:
    """The family that the digits come in by `config`, and its options with the embedded weights."""
    from digits import FOLDERS, OPTIONS

    name = config.pop("family", "ldm")
    if name not in FAMILIES:
        raise BackendError(f"backend_config.family is {name!r}, expected one of {', '.join(FAMILIES)}")
    family = find_family(name)
    family.check_options(config)
    embedded = {"model_name_or_path": str(FOLDERS[name]), "identity": "embedded"}
    return family, embedded | OPTIONS[name] | config


def load_backend(spec: Spec, device: torch.device | str, dtype: torch.dtype | str | None = None) -> Backend:
    """The backbone that a spec names (backend, backend_config), frozen, on `device`.

    Args:
        spec: names the backbone and its options.
        device: where its networks go.
        dtype: their number type; None or "auto" takes backend_config.torch_dtype, else float16 (FLUX:
            bfloat16) on CUDA and float32 elsewhere.

    Raises:
        BackendError: an unknown name or option, or missing weights.
    """
    device = torch.device(device)
    family, config = check_backend(spec)
    chosen = config.get("torch_dtype") if dtype in (None, "auto") else dtype
    if config.get("enable_model_cpu_offload") and device.type == "cpu":
        raise BackendError("enable_model_cpu_offload needs an accelerator, but the device is cpu")
    name = family.name if is_code(spec.backend) else str(spec.backend)
    return family.load(config, device, resolve_dtype(chosen, device, family), name)


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device, family: Family) -> torch.dtype:
    """A dtype by name; auto is the family's own on CUDA and float32 elsewhere."""
    if family.fixed_dtype is not None:
        if dtype not in (None, "auto", family.fixed_dtype):
            raise BackendError(
                f"backend {family.name!r} has the number type {family.fixed_dtype} only: leave out {dtype}"
            )
        return family.fixed_dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        return family.half if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise BackendError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_backbone_known(spec: Spec, source: object) -> None:
    """Refuse a predictor of an unknown backbone, which only a denoiser of the user's own can sample.

    Args:
        spec: what the predictor recorded.
        source: its file, for the message.

    Raises:
        BackendError: the backbone is not among NAMES.
    """
    foreign = spec.backend is None and spec.dataset_name not in (None, "ms_coco", "digits")
    if foreign or not (spec.backend in (None, *NAMES) or is_code(spec.backend)):
        backbone = "no backbone" if spec.backend is None else f"backbone {spec.backend!r}"
        raise BackendError(
            f"{source} was made for dataset {spec.dataset_name!r} and records {backbone}, expected one of"
            f" {', '.join(NAMES)}; sample it with your own denoiser: load_predictor, nodes,"
            " velocity_from_denoiser and sample, as docs/library.md shows"
        )
