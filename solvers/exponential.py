"""Exponential multistep: DPM-Solver++ and UniPC. One evaluation a step; earlier denoised states are
remembered.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .multi_step import check_order
from .solver import Solver


@dataclass(frozen=True)
class Exponential(Solver):
    """What DPM-Solver++ and UniPC share: multistep on the denoised state D in lambda = log(alpha / sigma),
    half the log SNR.

    The ODE is dx/dsigma = (x - D) / sigma for eps- and flow-matching models alike; alpha is 1 for the former
    and, with `flow`, 1 - sigma for the latter, whose states x / (1 - sigma) then are those of the former at
    sigma / (1 - sigma). Into sigma 0: order 1, x = D. `lower_order_final` lets the order fall in the last
    steps, as diffusers does below 15.
    """

    order: int = 2
    lower_order_final: bool = False
    flow: bool = False

    def __post_init__(self):
        check_order(type(self).__name__, self.order, 3)

    def check(self, sigmas):
        if self.flow and sigmas[0] > 1:
            raise ValueError(
                f"{type(self).__name__}: noise level {sigmas[0].item():g} of a flow-matching model, expected"
                " at most 1"
            )

    def order_of(self, remaining: int) -> int:
        """The order of a step when `remaining` steps are left, itself included."""
        return min(self.order, remaining) if self.lower_order_final else self.order

    def alpha(self, sigma: float) -> float:
        return 1 - sigma if self.flow else 1.0

    def half_log_snr(self, sigma: float) -> float:
        alpha = self.alpha(sigma)
        return math.log(alpha / sigma) if alpha > 0 else -math.inf


@dataclass(frozen=True)
class DPMpp(Exponential):
    """DPM-Solver++(1M, 2M, 3M) (Lu et al. 2022, equations 8 and 9), an exponential multistep method.

    3M is the published formula, which takes half of its second-derivative term: it converges with order 2.
    """

    def step(self, velocity, x, sigmas, n, history):
        s, s_next = sigmas[n : n + 2].tolist()
        data = x - s * velocity(x, sigmas[n])
        known = ((data, self.half_log_snr(s)), *history)[: self.order_of(len(sigmas) - 1 - n)]
        history = known[: self.order - 1]
        if s_next == 0:
            return data, history
        h, alpha = self.half_log_snr(s_next) - known[0][1], self.alpha(s_next)
        update = (s_next / s) * x - alpha * math.expm1(-h) * data
        if len(known) > 1:
            d1, d2 = _divided_differences(known, h)
            if d2 is None:
                update = update - 0.5 * alpha * math.expm1(-h) * d1
            else:
                phi2 = math.expm1(-h) / h + 1
                phi3 = phi2 / h - 0.5
                update = update + alpha * (phi2 * d1 - phi3 * d2)
        return update, history


def _divided_differences(history: tuple, h: float) -> tuple[Tensor, Tensor | None]:
    """Estimates of h D' and, from 3 entries, h^2 D'' / 2 at the newest of (D, lambda), newest first; D' is
    dD/dlambda.
    """
    (m0, l0), (m1, l1) = history[:2]
    r0 = (l0 - l1) / h
    d1_0 = (m0 - m1) / r0
    if len(history) == 2:
        return d1_0, None
    m2, l2 = history[2]
    r1 = (l1 - l2) / h
    d1_1 = (m1 - m2) / r1
    return d1_0 + (r0 / (r0 + r1)) * (d1_0 - d1_1), (d1_0 - d1_1) / (r0 + r1)


@dataclass(frozen=True)
class UniPC(Exponential):
    """UniPC with B2(h) (Zhao et al. 2023, algorithms 5 and 6, data prediction): predictor and corrector from
    the same evaluations.

    The corrector at a node uses the evaluation that the next predictor needs anyway, so a step costs one
    evaluation and the last state is a predicted one.
    """

    def step(self, velocity, x, sigmas, n, history):
        s, s_next = sigmas[n : n + 2].tolist()
        data = x - s * velocity(x, sigmas[n])
        past, start = history if history else ((), None)
        if past:
            x = self._update(start, past, s, corrector=data)
        past = ((data, s), *past)[: self.order_of(len(sigmas) - 1 - n)]
        if s_next == 0:
            return data, (past, x)
        return self._update(x, past, s_next), (past, x)

    def _update(self, x: Tensor, past: tuple, s_next: float, corrector: Tensor | None = None) -> Tensor:
        """From x at the newest node of `past`, pairs (D, sigma), to s_next; with `corrector`, D there, the
        corrected state.
        """
        m0, s0 = past[0]
        start = self.half_log_snr(s0)
        h = self.half_log_snr(s_next) - start
        ratios, others = [(self.half_log_snr(s) - start) / h for _, s in past[1:]], [m for m, _ in past[1:]]
        if corrector is not None:
            ratios, others = [*ratios, 1.0], [*others, corrector]
        gain = self.alpha(s_next) * math.expm1(-h)
        update = torch.sub((s_next / s0) * x, m0, alpha=gain)
        for weight, ratio, other in zip(_unipc_weights(tuple(ratios), h), ratios, others, strict=True):
            update = torch.sub(update, other - m0, alpha=gain * weight / ratio)
        return update


@lru_cache(1024)
def _unipc_weights(ratios: tuple[float, ...], h: float) -> tuple[float, ...]:
    """The weights a of UniPC's equation R a = b / B2(h), kept for the next batch; a single term takes its
    limit 1/2 (remark 3.3).

    Pure noise is infinitely far away, and its weight 0.
    """
    if len(ratios) < 2:
        return (0.5,) * len(ratios)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1.0, []
    for i in range(1, len(ratios) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    near = [r for r in ratios if math.isfinite(r)]
    powers = torch.tensor([[r**i for r in near] for i in range(len(near))], dtype=torch.float64)
    weights = iter(torch.linalg.solve(powers, torch.tensor(b[: len(near)], dtype=torch.float64)).tolist())
    return tuple(next(weights) if math.isfinite(r) else 0.0 for r in ratios)
