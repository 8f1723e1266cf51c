"""One-step baselines: Euler, Heun, DPM-Solver-2."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .schedules import polynomial
from .solver import Solver, Velocity


def first_velocity(velocity: Velocity, x: Tensor, sigmas: Tensor, n: int, afs: bool) -> Tensor:
    """The velocity at the start of interval n; with `afs` the first one is x / sqrt(1 + sigma^2), without an
    NFE.

    The analytical first step (AFS; Dockhorn et al. 2022, GENIE) assumes data of unit variance in the
    variance-exploding convention; it does not apply to flow matching.
    """
    if afs and n == 0:
        return x / (1 + sigmas[0] ** 2).sqrt()
    return velocity(x, sigmas[n])


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method, which is DDIM (Song et al. 2021): 1 evaluation a step, order 1."""

    afs: bool = False

    def step(self, velocity, x, sigmas, n, history):
        return x + (sigmas[n + 1] - sigmas[n]) * first_velocity(velocity, x, sigmas, n, self.afs), ()


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method (Karras et al. 2022, algorithm 1): 2 evaluations a step, order 2; Euler's into
    sigma 0.
    """

    afs: bool = False

    def step(self, velocity, x, sigmas, n, history):
        h = sigmas[n + 1] - sigmas[n]
        d = first_velocity(velocity, x, sigmas, n, self.afs)
        if sigmas[n + 1] == 0:
            return x + h * d, ()
        return x + h / 2 * (d + velocity(x + h * d, sigmas[n + 1])), ()


@dataclass(frozen=True)
class DPM2(Solver):
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1), midpoint at s'^r s^(1-r): 2 evaluations a step, order 2.

    A step into sigma 0, whose midpoint would lie at 0, is an Euler step.
    """

    r: float = 0.5
    afs: bool = False

    def __post_init__(self):
        if not 0 < self.r <= 1:
            raise ValueError(f"DPM2: r is {self.r}, expected 0 < r <= 1")

    def step(self, velocity, x, sigmas, n, history):
        s, s_next = sigmas[n], sigmas[n + 1]
        d = first_velocity(velocity, x, sigmas, n, self.afs)
        if s_next == 0:
            return x + (s_next - s) * d, ()
        middle = s_next**self.r * s ** (1 - self.r)
        d_middle = velocity(x + (middle - s) * d, middle)
        share = 1 / (2 * self.r)
        return x + (s_next - s) * (share * d_middle + (1 - share) * d), ()


@dataclass(frozen=True)
class DPM(Solver):
    """DPM-Solver-2 on `inner_steps` polynomial nodes (rho 7) in each interval: 2 (inner_steps - 1)
    evaluations.
    """

    inner_steps: int = 2
    afs: bool = False

    def __post_init__(self):
        if self.inner_steps < 2:
            raise ValueError(f"DPM: inner_steps is {self.inner_steps}, expected at least 2 nodes")

    def step(self, velocity, x, sigmas, n, history):
        if sigmas[n + 1] == 0:
            return Euler(self.afs).step(velocity, x, sigmas, n, ())
        inner = (
            polynomial(self.inner_steps, sigmas[n + 1].item(), sigmas[n].item())
            if self.inner_steps > 2
            else sigmas[n : n + 2]
        )
        for i in range(len(inner) - 1):
            x, _ = DPM2(afs=self.afs and n == i == 0).step(velocity, x, torch.as_tensor(inner), i, ())
        return x, ()
