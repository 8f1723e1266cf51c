"""Schedules: the nodes (noise levels sigma, descending, float64) between which a solver steps."""

import math

import torch
from torch import Tensor


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7) -> Tensor:
    """EDM's nodes [num_steps], uniform in sigma^(1/rho) (Karras et al. 2022, equation 5), sigma_max first."""
    u = _ramp(num_steps, sigma_min, sigma_max, rho)
    nodes = (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return _pinned(nodes, sigma_min, sigma_max)


def logsnr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Nodes uniform in log sigma (Lu et al. 2022, DPM-Solver): [num_steps], sigma_max to sigma_min."""
    u = _ramp(num_steps, sigma_min, sigma_max)
    nodes = (math.log(sigma_max) + u * (math.log(sigma_min) - math.log(sigma_max))).exp()
    return _pinned(nodes, sigma_min, sigma_max)


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> Tensor:
    """Nodes [num_steps] uniform in t^(1/rho), t the time of the linear-beta VP process (Song et al. 2021)."""
    u = _ramp(num_steps, sigma_min, sigma_max, rho)
    epsilon = 1e-3
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    beta_min = high - beta_d / 2
    t = (1 + u * (epsilon ** (1 / rho) - 1)) ** rho
    nodes = torch.expm1(beta_d / 2 * t**2 + beta_min * t).sqrt()
    return _pinned(nodes, sigma_min, sigma_max)


def flowmatch(num_steps: int, shift: float | None = None, mu: float | None = None) -> Tensor:
    """Flow-matching nodes (Esser et al. 2024, section 5.3.2): `shift` (SD3: 3) or `mu` (FLUX at 1024 pixels:
    1.15).

    They equal FlowMatchEulerDiscreteScheduler's own grid without its final 0. With a static shift that grid
    ends at the shifted 0.001 and is shifted once more, so that SD3's last node is 0.0089, not 0.0030.
    """
    if (shift is None) == (mu is None):
        raise ValueError(f"flowmatch: shift is {shift} and mu is {mu}, expected either shift or mu")
    if (shift is not None and not 0 < shift < math.inf) or (mu is not None and not abs(mu) < 20):
        raise ValueError(f"flowmatch: shift {shift} or mu {mu} out of range, expected shift > 0 or |mu| < 20")
    u = _ramp(num_steps, 0.001, 1.0)
    if shift is None:
        assert mu is not None
        return _pinned(math.exp(mu) / (math.exp(mu) + 1 / (1 + u * (0.001 - 1)) - 1), sigma_max=1.0)
    low = shift * 0.001 / (1 + (shift - 1) * 0.001)
    u = 1 + u * (low - 1)
    return _pinned(shift * u / (1 + (shift - 1) * u), sigma_max=1.0)


def dynamic_shift(
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
) -> float:
    """FLUX.1's mu for an image of so many tokens: linear between the two ends of its scheduler's
    configuration.
    """
    rise = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    return base_shift + rise * (tokens - base_image_seq_len)


class NoiseSchedule:
    """Continuous noise level of a discrete-time eps-model: log alpha, piecewise linear through t = i/T, i =
    1..T.

    alphas_cumprod [T] is the training schedule; sigma = sqrt(1 - alpha^2) / alpha is the variance-exploding
    noise level (DPM-Solver, appendix D.4). Beyond both ends the end segment is extended.
    """

    def __init__(self, alphas_cumprod: Tensor):
        a = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        if a.ndim != 1 or len(a) < 2 or not (a.diff() < 0).all() or a[0] >= 1 or a[-1] <= 0:
            ends = a.flatten()[[0, -1]].tolist() if a.numel() else []
            raise ValueError(
                "noise schedule: alphas_cumprod must be 1-D and fall strictly within (0, 1), but goes from"
                f" and to {ends}"
            )
        self.log_alpha = 0.5 * a.log()
        self.times = torch.arange(1, len(a) + 1, dtype=torch.float64) / len(a)

    @property
    def sigma_min(self) -> float:
        return self.sigma(self.times[0]).item()

    @property
    def sigma_max(self) -> float:
        return self.sigma(self.times[-1]).item()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at times t in (0, 1], any shape."""
        log_alpha = _interpolate(t.to(torch.float64), self.times, self.log_alpha)
        return torch.expm1(-2 * log_alpha).sqrt()

    def t(self, sigma: Tensor) -> Tensor:
        """Time of noise levels sigma, any shape: the inverse of sigma(t)."""
        log_alpha = -0.5 * torch.log1p(sigma.to(torch.float64) ** 2)
        return _interpolate(log_alpha, self.log_alpha.flip(0), self.times.flip(0))


def discrete(num_steps: int, noise_schedule: NoiseSchedule) -> Tensor:
    """Nodes [num_steps] uniform in the time of a noise schedule, from t = 1 to its first knot (Stable
    Diffusion).
    """
    first, last = noise_schedule.times[0].item(), noise_schedule.times[-1].item()
    return noise_schedule.sigma(last + _ramp(num_steps, first, last) * (first - last))


def _ramp(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1) -> Tensor:
    if not 0 < rho < math.inf:
        raise ValueError(f"schedule: rho is {rho}, expected a number above 0")
    if num_steps < 2:
        raise ValueError(f"schedule: {num_steps} nodes, expected at least 2")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"schedule: sigma_min {sigma_min} and sigma_max {sigma_max} must satisfy 0 < sigma_min <"
            " sigma_max"
        )
    return torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)


def _pinned(nodes: Tensor, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
    """Without the rounding of the formula at the known ends."""
    if sigma_max is not None:
        nodes[0] = sigma_max
    if sigma_min is not None:
        nodes[-1] = sigma_min
    if not nodes.isfinite().all() or (nodes.diff() >= 0).any():
        raise ValueError(
            f"schedule: its nodes {[round(s, 6) for s in nodes.tolist()]} do not descend; choose other noise"
            " levels or rho"
        )
    return nodes


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots ascending; linear beyond the ends."""
    i = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    rate = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + rate * (x - knots[i - 1])


SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")


def schedule_nodes(
    kind: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float | None = None
) -> Tensor:
    """The nodes [num_steps] of a schedule that its ends determine: polynomial, logsnr, time_uniform; else
    ValueError.
    """
    warp = {} if rho is None else {"rho": rho}
    if kind == "polynomial":
        return polynomial(num_steps, sigma_min, sigma_max, **warp)
    if kind == "logsnr":
        return logsnr(num_steps, sigma_min, sigma_max)
    if kind == "time_uniform":
        return time_uniform(num_steps, sigma_min, sigma_max, **warp)
    raise ValueError(
        f"schedule {kind!r}: its ends do not determine its nodes; expected polynomial, logsnr or time_uniform"
    )
