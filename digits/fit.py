"""One training loop for every part of the digits backbone: seeded by step, with a progress bar and resume."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

Net = TypeVar("Net", bound=torch.nn.Module)


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        steps: number of AdamW steps.
        lr: highest learning rate, after a linear warm-up over a fiftieth of the steps; then cosine decay.
        checkpoint: file of the state to go on from; a finished one is read and not trained again.
        seed: seed of the run; all random numbers of step i come from a generator seeded by (seed, i), so that
            an interrupted run that goes on from its checkpoint gives the very same weights.
        ema_decay: of the moving average of the weights; 0 for none.
        save_every: steps between checkpoints.
    """

    steps: int
    lr: float
    checkpoint: Path
    seed: int
    ema_decay: float = 0.0
    save_every: int = 500


def fit(network: Net, loss_fn: Callable[[torch.Generator], torch.Tensor], training: Training) -> Net:
    """Minimise loss_fn with AdamW (Loshchilov and Hutter 2019); the moving average of the weights is
    returned.
    """
    ema, steps = copy.deepcopy(network).requires_grad_(False), training.steps
    optimiser = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=0.01)
    schedule = warmup_cosine(optimiser, steps, training.lr)
    parts: dict[str, Any] = {"modules": network, "ema": ema, "optimiser": optimiser, "schedule": schedule}
    start = resume(parts, training.checkpoint)
    bar = tqdm(range(start, steps), desc=training.checkpoint.stem, initial=start, total=steps, disable=None)
    for step in bar:
        loss = loss_fn(torch.Generator().manual_seed(training.seed * 1_000_003 + step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        update_average(ema, network, min(training.ema_decay, (1 + step) / (10 + step)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % training.save_every == 0 or step + 1 == steps:
            save(parts, step + 1, training.checkpoint)
    return ema.eval()


def warmup_cosine(
    optimiser: torch.optim.Optimizer, steps: int, lr: float
) -> torch.optim.lr_scheduler.SequentialLR:
    """A linear warm-up over a fiftieth of the steps, then cosine decay to a hundredth of the rate."""
    warmup, floor = max(1, steps // 50), 0.01
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps - warmup, eta_min=floor * lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimiser, 0.05, 1.0, warmup)
    return torch.optim.lr_scheduler.SequentialLR(optimiser, [rise, cosine], [warmup])


@torch.no_grad()
def update_average(ema: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """One step of the moving average of the parameters; buffers are copied."""
    for average, value in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(value, 1 - decay)
    for buffer, current in zip(ema.buffers(), network.buffers(), strict=True):
        buffer.copy_(current)


def save(parts: dict[str, Any], step: int, checkpoint: Path) -> None:
    """Write the state of a run after some steps, as a whole or not at all."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"step": step}
    torch.save(state, checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def resume(parts: dict[str, Any], checkpoint: Path) -> int:
    """Restore the state of a run from its checkpoint, if there is one; returns the steps already done."""
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True)
    start = saved.pop("step")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return start
