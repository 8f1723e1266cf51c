"""One training loop for every part of the digits backbone: seeded by step, with a progress bar and resume."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm


def fit(
    modules: torch.nn.Module,
    loss_fn: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    lr: float,
    checkpoint: Path,
    seed: int,
    ema_decay: float = 0.0,
    save_every: int = 500,
) -> torch.nn.Module:
    """Minimise loss_fn with AdamW and a warm-up + cosine rate; returns the (moving average of the) modules.

    Every random number of step i comes from a generator seeded by (seed, i), so that a run that was
    interrupted and goes on from its checkpoint gives the very same weights. A finished checkpoint is read and
    not trained again.
    """
    ema = copy.deepcopy(modules).requires_grad_(False)
    optimiser = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01)
    warmup, floor = max(1, steps // 50), 0.01
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps - warmup, eta_min=floor * lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, 1.0, warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [rise, cosine], [warmup])
    parts = {"modules": modules, "ema": ema, "optimiser": optimiser, "schedule": schedule}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(start, steps), desc=checkpoint.stem, initial=start, total=steps, disable=None)
    for step in bar:
        loss = loss_fn(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), modules.parameters(), strict=True):
                average.lerp_(value, 1 - decay)
            for average, value in zip(ema.buffers(), modules.buffers(), strict=True):
                average.copy_(value)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    return ema.eval()
