"""EPD-Solver and EPD-Plugin: K parallel gradients a step at learned points, combined with learned weights."""

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

    The gradient d at x places K points x_k = x + (s_k - s) d at s_k = s'^r_k s^(1-r_k); the update is (s' -
    s) sum_k w_k o_k a_k velocity(x_k, a_k s_k) with the scales o (direction) and a (time; it multiplies the
    gradient too, as in the published solver). max_order > 1 is EPD-Plugin: iPNDM's extrapolation of d places
    the points. `parallel` makes the K evaluations one batch, or batches of at most `max_batch` rows (whole
    points); the result does not depend on it. The table may hold one table per image: [B, N, K].
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
    """An EPD solver on nodes: distances of the points from their node, their noise levels, weights of their
    gradients [..., N, K].
    """

    epd: EPD
    offsets: Tensor
    levels: Tensor
    weights: Tensor

    def step(self, velocity, x, sigmas, n, history):
        images = self.offsets.shape[:-2]
        if images and images != (len(x),):
            raise ValueError(f"EPD: one table per image for {list(images)} images, but there are {len(x)}")
        d = first_velocity(velocity, x, sigmas, n, self.epd.afs)
        e, history = extrapolate(d, history, self.epd.max_order)
        points = [x + coefficient(offset, x) * e for offset in self.offsets[..., n, :].unbind(-1)]
        velocities = self._gradients(velocity, points, self.levels[..., n, :])
        for weight, slope in zip(self.weights[..., n, :].unbind(-1), velocities, strict=True):
            x = x + coefficient(weight, x) * slope
        return x, history

    def _gradients(self, velocity: Velocity, points: list[Tensor], levels: Tensor) -> list[Tensor]:
        """The gradients at K points [B, ...] of noise levels [K] or [B, K], in point-major batches."""
        batch, per_call = len(points[0]), len(points) if self.epd.parallel else 1
        if self.epd.max_batch is not None:
            per_call = max(1, min(per_call, self.epd.max_batch // batch))
        levels = levels.expand(batch, -1).T
        velocities: list[Tensor] = []
        for i in range(0, len(points), per_call):
            chunk = points[i : i + per_call]
            velocities += velocity(torch.cat(chunk), levels[i : i + per_call].reshape(-1)).split(batch)
        return velocities
