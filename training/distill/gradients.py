"""The gradient of a chunk of pairs: in smaller parts where memory ends, and of a scaled loss where the
network is in float16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers import UserError

from .bank import Bank
from .config import LossConfig, TrainConfig
from .losses import Loss, checkpointed, point_by_point
from .students import Student

# gradients of an RMSE over 16 x 128 x 128 latents are near 4e-6, float16's smallest normal is 6e-5
FLOAT16_SCALE, LOWER = 2.0**12, 4.0


def term_names(weights: LossConfig) -> list[str]:
    """The terms of a loss in the order in which they are reported."""
    return sorted(
        name for name in ("stepwise", "trajectory", "final", "decoded", "feature") if vars(weights)[name]
    )


@dataclass
class ChunkGradient:
    """The gradient of a student's loss on some pairs of a bank, of whose states `kept` are the targets.

    `pairs` is how many one forward and backward pass may have: it is halved whenever memory ends, down to
    one; after that each point of a level has a network call of its own. Both stay so for the rest of a run.
    """

    student: Student
    loss: Loss
    bank: Bank
    kept: list[int]
    settings: TrainConfig

    def __post_init__(self):
        self.parameters = self.student.parameters()
        self.terms = term_names(self.loss.config)
        self.pairs, self.points_apart = self.settings.chunk, False

    def __call__(self, indices: list[int]) -> Tensor:
        """The summed gradient of the pairs, then their summed loss and terms, and the first interval that
        broke (-1 for none).
        """
        while True:
            size = min(self.pairs, len(indices))
            try:
                return summed([self.row(indices[i : i + size]) for i in range(0, len(indices), size)])
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0][:200]
            self.use_less_memory(size, reason)
            torch.cuda.empty_cache()

    def use_less_memory(self, size: int, reason: str) -> None:
        """After `size` pairs did not fit: half as many at a time, then one call a point; UserError where
        there is nothing left.
        """
        if size == 1 and self.points_apart:
            raise UserError(
                f"out of memory with one pair at a time and one network call a point ({reason}); set"
                " train.checkpointing or backend.block_checkpointing to true, a smaller backend.dtype, or"
                " backend.config.offload to true"
            )
        self.points_apart |= size == 1
        while self.pairs >= size > 1:  # halves of train.chunk, whichever chunk did not fit
            self.pairs = -(-self.pairs // 2)

    def row(self, indices: list[int]) -> Tensor:
        """The row of a few pairs; a float16 network's gradient that overflows is computed again from a lower
        scale of the loss.
        """
        scale = FLOAT16_SCALE if self.bank.backend.dtype == torch.float16 else 1.0
        count = sum(p.numel() for p in self.parameters)
        while True:
            row = self.scaled_row(indices, scale)
            if scale == 1 or row[:count].isfinite().all() or not row[count].isfinite():
                return row
            scale /= LOWER

    def scaled_row(self, indices: list[int], scale: float) -> Tensor:
        """The row of a few pairs in float64, its gradient that of the scaled loss over the scale."""
        condition, x, states = self.bank.rows(indices)
        velocity = self.bank.backend.velocity(condition)
        if self.settings.checkpointing:
            velocity = checkpointed(velocity)
        if self.points_apart:
            velocity = point_by_point(velocity, len(x))
        loss, terms, broken = self.loss(*self.student.solver(), velocity, x, states[self.kept])
        gradients = torch.autograd.grad(loss.sum() * scale, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, gradients, strict=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        scores = [loss.detach().sum(), *[terms[name].detach().sum() for name in self.terms]]
        row = [
            *[g.flatten().cpu().double() / scale for g in flat],
            *[s.double().reshape(1).cpu() for s in scores],
        ]
        return torch.cat([*row, torch.tensor([float(broken)], dtype=torch.float64)])


def summed(rows: list[Tensor]) -> Tensor:
    """The row of all pairs from those of its parts."""
    if len(rows) == 1:
        return rows[0]
    together = torch.stack(rows)
    broken = together[:, -1][together[:, -1] >= 0]
    return torch.cat([together[:, :-1].sum(0), broken.min()[None] if len(broken) else together[:1, -1]])
