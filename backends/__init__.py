"""Pretrained families as right-hand sides of one ODE: load_backend makes them, Backend is their interface."""

from .base import SCHEDULES, Backend, BackendError, initial_noise
from .conditioning import Condition
from .family import Family, Size
from .registry import (
    DTYPES,
    FAMILIES,
    NAMES,
    check_backbone_known,
    check_backend,
    find_family,
    load_backend,
    resolve_dtype,
)

__all__ = [
    "DTYPES",
    "FAMILIES",
    "NAMES",
    "SCHEDULES",
    "Backend",
    "BackendError",
    "Condition",
    "Family",
    "Size",
    "check_backbone_known",
    "check_backend",
    "find_family",
    "initial_noise",
    "load_backend",
    "resolve_dtype",
]
