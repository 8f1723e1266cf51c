"""Probability-flow ODEs with exact solutions, nonlinear fields, and the tables that the tests share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers import EPD, SolverTable


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """A noise level, [] or [rows], in the shape in which it acts on x [rows, ...]."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture on the line, seen through x = a x0 + b eps, one independent copy for each entry of
    x.

    Variance exploding: a = 1, b = sigma. Flow matching (`flow`): a = 1 - t, b = t. Either way dx/db = (x -
    E[x0 | x]) / b.
    """

    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    means: tuple[float, ...] = (-1.3, 0.4, 2.0)
    stds: tuple[float, ...] = (0.5, 0.7, 0.6)
    flow: bool = False

    def _marginal(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, and the means and standard deviations of the components at level b, on a last axis."""
        a = 1 - b if self.flow else torch.ones_like(b)
        means, stds = torch.tensor(self.means, dtype=b.dtype), torch.tensor(self.stds, dtype=b.dtype)
        return a[..., None], a[..., None] * means, ((a[..., None] * stds) ** 2 + b[..., None] ** 2).sqrt()

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] at noise levels sigma, [] or [rows]."""
        a, means, deviations = self._marginal(per_row(sigma, x))
        z = (x[..., None] - means) / deviations
        responsibilities = (
            torch.tensor(self.weights, dtype=x.dtype).log() - deviations.log() - z**2 / 2
        ).softmax(-1)
        variances = torch.tensor(self.stds, dtype=x.dtype) ** 2
        posterior = torch.tensor(self.means, dtype=x.dtype) + a * variances / deviations * z
        return (responsibilities * posterior).sum(-1)

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        return (x - self.denoiser(x, sigma)) / per_row(sigma, x)

    def cdf(self, x: Tensor, sigma: Tensor) -> Tensor:
        _, means, deviations = self._marginal(per_row(torch.as_tensor(sigma, dtype=x.dtype), x))
        z = (x[..., None] - means) / deviations
        return (torch.tensor(self.weights, dtype=x.dtype) * torch.special.ndtr(z)).sum(-1)

    def quantile(self, u: Tensor, sigma: Tensor) -> Tensor:
        """The inverse of cdf, by bisection to the last bit."""
        low, high = torch.full_like(u, -1e3), torch.full_like(u, 1e3)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, sigma) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def solve(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The exact flow: on the line it keeps quantiles, F_end(x(end)) = F_start(x(start))."""
        return self.quantile(self.cdf(x, start), end)


QUANTILES = torch.tensor([[0.07], [0.31], [0.52], [0.74], [0.91]], dtype=torch.float64)


@dataclass(frozen=True)
class Conditioned:
    """A nonlinear field for images with conditions c [B]: row m*B + b of a call belongs to image b."""

    conditions: Tensor

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        c = per_row(self.conditions.repeat(len(x) // len(self.conditions)), x)
        level = per_row(sigma, x).log1p()
        return torch.sin(1.3 * x + c * level) + 0.4 * torch.tanh(x.roll(1, -1) - level) * c


def nonlinear(x: Tensor, sigma: Tensor) -> Tensor:
    """The field of one condition for all rows."""
    return Conditioned(torch.tensor([0.7], dtype=x.dtype))(x, sigma)


class Recorded:
    """A field that remembers the rows and the noise levels of its calls."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor] = nonlinear):
        self.field, self.rows, self.sigmas = field, [], []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.rows.append(len(x))
        self.sigmas.append(sigma)
        return self.field(x, sigma)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_table(*shape: int, seed: int = 0, scales: bool = False) -> SolverTable:
    """A table [..., N, K] of positions within (0.05, 0.95) and, with `scales`, of scales within (0.9,
    1.1).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    r, w = 0.05 + 0.9 * uniform(), 0.1 + uniform()
    scale_dir, scale_time = (0.9 + 0.2 * uniform(), 0.9 + 0.2 * uniform()) if scales else (None, None)
    return SolverTable(r, w / w.sum(-1, keepdim=True), scale_dir, scale_time)


def constant_table(num_intervals: int, r: tuple[float, ...], w: tuple[float, ...]) -> SolverTable:
    """The same row in each interval."""
    rows = [torch.tensor(v, dtype=torch.float64).expand(num_intervals, -1) for v in (r, w)]
    return SolverTable(*rows)


def epd(
    num_intervals: int, r: tuple[float, ...], w: tuple[float, ...], max_order: int = 1, afs: bool = False
) -> EPD:
    return EPD(constant_table(num_intervals, r, w), afs=afs, max_order=max_order)


def slope(steps: list[int], errors: list[float]) -> float:
    """The order of convergence: minus the regression slope of log error on log number of steps."""
    x, y = [math.log(n) for n in steps], [math.log(e) for e in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return -covariance / sum((a - mean_x) ** 2 for a in x)
