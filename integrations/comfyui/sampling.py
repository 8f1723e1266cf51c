"""What ComfyUI's KSAMPLER calls: sample_epd, with points in one batch only where its rows may differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sample_epd import LearnedTable, sample_epd

FOR_ALL_ROWS = {  # of a condition: what looks at a batch's first noise level, or has rows for each image
    "timestep_start": "a condition with a timestep range",
    "timestep_end": "a condition with a timestep range",
    "control": "a ControlNet",
    "hooks": "hooks on a condition",
    "gligen": "GLIGEN",
    "mask": "a masked condition",
}
FOR_ALL_CALLS = {  # of model_options: code of other nodes around each call
    "model_function_wrapper": "a model function wrapper",
    "wrappers": "wrappers of the model",
}


def why_sequential(model: Any, images: int, extra_args: dict) -> str | None:
    """Why the points of a level cannot be one batch, in words, or None.

    ComfyUI tiles conditions over a batch and takes decisions from its first noise level for all rows.

    Args:
        model: the denoiser that KSAMPLER passes; its inner_model holds the conditions by name.
        images: the number of images B of a batch.
        extra_args: model_options, denoise_mask and others of the call.
    """
    if extra_args.get("denoise_mask") is not None and images > 1:
        return "a noise mask for several images"
    options = extra_args.get("model_options") or {}
    for key, reason in FOR_ALL_CALLS.items():
        if options.get(key) or (options.get("transformer_options") or {}).get(key):
            return reason
    for conditions in model.inner_model.conds.values():
        for condition in conditions or []:
            for key, reason in FOR_ALL_ROWS.items():
                if condition.get(key) is not None:
                    return reason
            for part in (condition.get("model_conds") or {}).values():
                if torch.is_tensor(part.cond) and part.cond.ndim and images % len(part.cond):
                    return f"a condition of {len(part.cond)} rows for {images} images"
    return None


def sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    table: LearnedTable,
    parallel_points: bool = True,
) -> Tensor:
    """sample_epd with all points of a level in one call, or one where that is impossible or not wanted."""
    extra_args = extra_args or {}
    sequential = not parallel_points or why_sequential(model, len(x), extra_args) is not None
    return sample_epd(
        model, x, sigmas, extra_args, callback, disable, table=table, points_per_call=1 if sequential else 0
    )
