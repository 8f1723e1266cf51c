"""Checks of what was unpickled: mappings, tensors and plain data of the expected types."""

from collections.abc import Collection
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from .options import SECRETS
from .safe_pickle import PredictorError


def mapping(
    value: Any, name: str, allowed: Collection[str] | None = None, required: Collection[str] = ()
) -> dict:
    """value, if it is a dict whose keys are all allowed, and those required are there."""
    if not isinstance(value, dict):
        raise PredictorError(f"{name} is {brief(value)}, expected a dict")
    for key in value:
        if allowed is not None and key not in allowed:
            raise PredictorError(f"unknown key {name}.{key if isinstance(key, str) else brief(key)}")
    for key in required:
        if key not in value:
            raise PredictorError(f"{name}.{key} is missing")
    return value


def tensor_of(value: Any, name: str, ndim: int) -> Tensor:
    """A float64 tensor of nested lists of numbers."""
    try:
        tensor = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PredictorError(
            f"{name} is {brief(value)}, expected numbers in lists of {ndim} dimensions"
        ) from None
    if tensor.ndim != ndim:
        raise PredictorError(f"{name} has {tensor.ndim} dimensions, expected {ndim}")
    if not tensor.isfinite().all():
        raise PredictorError(f"{name} holds {tensor[~tensor.isfinite()][0]}, expected finite numbers")
    return tensor


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """value, if it is made of dict, list, str, int, float, bool and None only, at most 8 deep; tuples become
    lists.

    Entries whose names say that they are secret are left out.
    """
    if depth > 8:
        raise PredictorError(f"{name} is nested more than 8 deep")
    if isinstance(value, dict):
        return {
            str(k): plain(v, f"{name}.{k}", depth + 1)
            for k, v in value.items()
            if not str(k).lower().endswith(SECRETS)
        }
    if isinstance(value, list | tuple):
        return [plain(v, name, depth + 1) for v in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise PredictorError(f"{name} holds a {type(value).__name__}, expected plain data")
