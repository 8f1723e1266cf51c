"""Pretrained families as right-hand sides of one ODE: load_backend makes them, Backend says what they offer."""

from importlib import import_module

import torch

from solvers import Spec

from .base import SCHEDULES, Backend, BackendError, Condition, initial_noise

NAMES = ("digits", "ldm", "sd3", "flux", "gaussian")
FAMILIES = ("ldm", "sd3", "flux")
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

__all__ = [
    "DTYPES",
    "NAMES",
    "SCHEDULES",
    "Backend",
    "BackendError",
    "Condition",
    "check_backbone_known",
    "check_backend",
    "initial_noise",
    "load_backend",
]


def load_backend(spec: Spec, device: torch.device | str, dtype: torch.dtype | str | None = None) -> Backend:
    """The backbone that a spec names (backend, backend_config), frozen, on `device`.

    dtype None or "auto": what backend_config.torch_dtype says, else float16 (FLUX: bfloat16) on CUDA and float32 elsewhere. An
    unknown name or option, or missing weights: BackendError.
    """
    device, name = torch.device(device), spec.backend
    family, config = check_backend(spec)
    if name == "gaussian":
        if dtype not in (None, "auto", torch.float64):
            raise BackendError(f"backend 'gaussian' is exact, in float64: leave out {dtype}")
        from .gaussian import GaussianMixture

        return GaussianMixture(device)
    number_type = resolve_dtype(config.get("torch_dtype") if dtype in (None, "auto") else dtype, device, family)
    if config.get("enable_model_cpu_offload") and device.type == "cpu":
        raise BackendError("enable_model_cpu_offload needs an accelerator, but the device is cpu")
    return import_module(f".{family}", __package__).load(config, device, number_type, name)


def check_backbone_known(spec: Spec, source: object) -> None:
    """Refuse a predictor of a backbone that is not among ours, which only a denoiser of the user's own can sample; `source` is its file."""
    foreign = spec.backend is None and spec.dataset_name not in (None, "ms_coco", "digits")
    if foreign or spec.backend not in (None, *NAMES):
        backbone = "no backbone" if spec.backend is None else f"backbone {spec.backend!r}"
        raise BackendError(
            f"{source} was made for dataset {spec.dataset_name!r} and records {backbone}, expected one of {', '.join(NAMES)}; sample it "
            "with your own denoiser: load_predictor, nodes, velocity_from_denoiser and sample, as README shows under 'As a library'"
        )


def check_backend(spec: Spec) -> tuple[str, dict]:
    """The family of a spec's backbone and its options, found good without loading weights; an unknown name or option: BackendError."""
    name, config = spec.backend, {k: v for k, v in spec.backend_config.items() if v is not None}
    if name is None:
        raise BackendError(f"the backbone is not named: expected one of {', '.join(NAMES)}")
    if name not in NAMES:
        raise BackendError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    if name == "gaussian":
        if config:
            raise BackendError(f"backend 'gaussian' is exact and has no options: leave out {config}")
        return name, config
    family = config.pop("family", "ldm") if name == "digits" else name
    if family not in FAMILIES:
        raise BackendError(f"backend_config.family is {family!r}, expected one of {', '.join(FAMILIES)}")
    import_module(f".{family}", __package__).check(config)
    if name == "digits":
        from .digits import FOLDERS, OPTIONS

        config = {"model_name_or_path": str(FOLDERS[family])} | OPTIONS[family] | config
    return family, config


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device, family: str) -> torch.dtype:
    """A dtype by name; auto is float16 (for FLUX bfloat16) on CUDA and float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        half = torch.bfloat16 if family == "flux" else torch.float16
        return half if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise BackendError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
