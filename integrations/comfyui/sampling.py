"""What ComfyUI's KSAMPLER calls: sample_epd, with points in one batch only where its rows may differ."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sample_epd import LearnedTable, sample_epd

CONDITIONS_READING_FIRST_SIGMA = {  # or with rows for each image
    "timestep_start": "a condition with a timestep range",
    "timestep_end": "a condition with a timestep range",
    "control": "a ControlNet",
    "hooks": "hooks on a condition",
    "gligen": "GLIGEN",
    "mask": "a masked condition",
}
PATCHES_AROUND_CALLS = {  # of model_options and its transformer_options: code of other nodes, for one sigma
    "model_function_wrapper": "a model function wrapper",
    "wrappers": "wrappers of the model",
    "denoise_mask_function": "a denoise mask function (Differential Diffusion)",
    "sampler_cfg_function": "a CFG function",
    "sampler_pre_cfg_function": "a function before CFG",
    "sampler_post_cfg_function": "a function after CFG",
    "sampler_calc_cond_batch_function": "a function around the conditions' batch",
    "patches": "patches of the model (such as Deep Shrink)",
    "patches_replace": "patches of the model",
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
    for key, reason in PATCHES_AROUND_CALLS.items():
        if options.get(key) or (options.get("transformer_options") or {}).get(key):
            return reason
    for conditions in model.inner_model.conds.values():
        for condition in conditions or []:
            for key, reason in CONDITIONS_READING_FIRST_SIGMA.items():
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
    reason = why_sequential(model, len(x), extra_args) if parallel_points else None
    if reason is not None:
        logging.info("EPDSampler: the points of a level run one after another: %s", reason)
    per_call = 0 if parallel_points and reason is None else 1
    return sample_epd(model, x, sigmas, extra_args, callback, disable, table=table, points_per_call=per_call)
