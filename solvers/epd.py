"""EPD-Solver and EPD-Plugin: K parallel evaluations a step at learned points, combined with learned
weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .multi_step import ADAMS_BASHFORTH, check_order, extrapolate
from .single_step import first_velocity
from .solver import Solver, Velocity, coefficient
from .table import SolverTable


@dataclass(frozen=True)
class EPD(Solver):
    """Ensemble parallel directions (EPD-Solver, arXiv 2512.22796): 2 serial levels and 1 + K evaluations a
    step.

    From x at s to s' with the row (r_k, w_k, o_k, a_k) of the table, k = 1..K:

        d   = velocity(x, s)                               or iPNDM's extrapolation of it (EPD-Plugin)
        s_k = s'^r_k s^(1-r_k),   x_k = x + (s_k - s) d
        x'  = x + (s' - s) sum_k w_k o_k a_k velocity(x_k, a_k s_k)

    o is scale_dir and a is scale_time, which multiplies the velocity too, as in the published solver.

    Args:
        table: r, w and scales, [N, K], or one table per image, [B, N, K].
        afs: the first d is the analytical first step.
        max_order: above 1 it is EPD-Plugin, with that order of extrapolation.
        parallel: the K evaluations are one batch; the result does not depend on it.
        max_batch: most rows in such a batch, in whole points.
    """

    table: SolverTable
    afs: bool = False
    max_order: int = 1
    parallel: bool = True
    max_batch: int | None = None

    def __post_init__(self):
        check_order("EPD", self.max_order, len(ADAMS_BASHFORTH))
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"EPD: max_batch is {self.max_batch}, expected at least 1")

    def check(self, sigmas):
        if len(sigmas) != self.table.num_intervals + 1:
            raise ValueError(
                f"EPD: {len(sigmas)} nodes, but the table is for {self.table.num_intervals + 1}"
                f" ({self.table.num_intervals} intervals)"
            )
        if sigmas[-1] == 0:
            raise ValueError(
                "EPD: the last node is 0, where no point can lie; end above 0 and use finish='denoise'"
            )

    def bind(self, sigmas):
        r, w, o, a = self.table.rows()
        s, s_next = sigmas[:-1, None], sigmas[1:, None]
        s_points = s_next**r * s ** (1 - r)
        return _BoundEPD(self, s_points - s, a * s_points, (s_next - s) * w * o * a)

    def step(self, velocity, x, sigmas, n, history):
        return self.bind(sigmas).step(velocity, x, sigmas, n, history)


@dataclass(frozen=True)
class _BoundEPD(Solver):
    """An EPD solver on its nodes: s_k - s, a_k s_k and the weights (s' - s) w_k o_k a_k of all points [...,
    N, K].
    """

    epd: EPD
    offsets: Tensor
    sigmas: Tensor
    weights: Tensor

    def step(self, velocity, x, sigmas, n, history):
        images = self.offsets.shape[:-2]
        if images and images != (len(x),):
            raise ValueError(f"EPD: one table per image for {list(images)} images, but there are {len(x)}")
        d = first_velocity(velocity, x, sigmas, n, self.epd.afs)
        e, history = extrapolate(d, history, self.epd.max_order)
        points = [x + coefficient(offset, x) * e for offset in self.offsets[..., n, :].unbind(-1)]
        velocities = self._evaluate(velocity, points, self.sigmas[..., n, :])
        for weight, g in zip(self.weights[..., n, :].unbind(-1), velocities, strict=True):
            x = x + coefficient(weight, x) * g
        return x, history

    def _evaluate(self, velocity: Velocity, points: list[Tensor], sigmas: Tensor) -> list[Tensor]:
        """The velocities at K points [B, ...] of noise levels [K] or [B, K], in point-major batches."""
        batch, per_call = len(points[0]), len(points) if self.epd.parallel else 1
        if self.epd.max_batch is not None:
            per_call = max(1, min(per_call, self.epd.max_batch // batch))
        rows = sigmas.expand(batch, -1).T
        velocities: list[Tensor] = []
        for i in range(0, len(points), per_call):
            inputs = torch.cat(points[i : i + per_call])
            velocities += velocity(inputs, rows[i : i + per_call].reshape(-1)).split(batch)
        return velocities
