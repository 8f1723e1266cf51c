"""The one loop over steps, what a solver is, and the k-diffusion denoiser convention."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Velocity = Callable[[Tensor, Tensor], Tensor]
FINISHES = ("none", "euler", "denoise")


class Solver:
    """A method for the ODE dx/dsigma = velocity(x, sigma): frozen coefficients and one step with explicit
    history.
    """

    def check(self, sigmas: Tensor) -> None:
        """Raise ValueError when this solver cannot run on the nodes sigmas [N]."""

    def bind(self, sigmas: Tensor) -> "Solver":
        """This solver with all that depends on the nodes alone worked out, once for a trajectory."""
        return self

    def num_steps(self, sigmas: Tensor) -> int:
        """How many steps the loop takes on the nodes sigmas [N]."""
        return len(sigmas) - 1

    def step(
        self, velocity: Velocity, x: Tensor, sigmas: Tensor, n: int, history: tuple
    ) -> tuple[Tensor, tuple]:
        """x at sigmas[n] -> x at sigmas[n + 1], and the history that the next step needs (empty at n = 0)."""
        raise TypeError(f"{type(self).__name__} has no step")


def trajectory(
    solver: Solver, velocity: Velocity, x: Tensor, sigmas: Tensor, detach: bool = False
) -> Iterator[Tensor]:
    """Integrate from x [B, ...] at sigmas[0] and yield the state at each of sigmas[1:].

    `velocity(x, sigma)` gets x [M*B, ...] (row m*B + b belongs to image b) and sigma [] or [M*B], float64, on
    the CPU wherever x is: noise levels are known before any network runs, so nothing waits for the device to
    tell them. The nodes descend and end at 0 or above; else ValueError. With `detach` no gradient crosses
    from one interval into the next.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    levels = sigmas.tolist() if sigmas.ndim == 1 else []
    if (
        len(levels) < 2
        or not all(map(isfinite, levels))
        or any(b >= a for a, b in pairwise(levels))
        or levels[-1] < 0
    ):
        raise ValueError("nodes: expected at least 2 finite noise levels, strictly descending, none below 0")
    solver.check(sigmas)
    bound = solver.bind(sigmas)
    history: tuple = ()
    for n in range(solver.num_steps(sigmas)):
        x, history = bound.step(velocity, x, sigmas, n, history)
        yield x
        if detach:
            x, history = x.detach(), tree_map_only(Tensor, Tensor.detach, history)


def sample(
    solver: Solver,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    callback: Callable[[int, Tensor], None] | None = None,
    finish: str = "none",
) -> Tensor:
    """Integrate from x at sigmas[0] to sigmas[-1] and return the state; callback(n, x) sees the state after
    step n.

    `finish` says what happens after a last node above 0: "none" (the published tables), or one more
    evaluation that removes the remaining noise, as an "euler" step to 0 or as "denoise", the denoiser's
    output there. For an ODE these two are one and the same, since D = x - sigma * velocity.
    """
    if finish not in FINISHES:
        raise ValueError(f"finish {finish!r}: expected one of {', '.join(FINISHES)}")
    for n, state in enumerate(trajectory(solver, velocity, x, sigmas)):
        x = state
        if callback is not None:
            callback(n, x)
    last = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")[-1]
    if finish == "none" or last == 0:
        return x
    return x - last * velocity(x, last)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`, copied from pinned memory where that avoids a synchronisation."""
    if device.type == "mps":
        return value.float().to(device)  # no float64 there
    if device.type == "cuda" and not value.requires_grad and not value.is_cuda:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def coefficient(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient, [] or one per image [B], in the shape in which it multiplies x [B, ...]."""
    if value.ndim == 0:
        return value
    return to_device(value, x.device).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def velocity_from_denoiser(denoiser: Velocity) -> Velocity:
    """The ODE of a k-diffusion denoiser D(x, sigma [B]): dx/dsigma = (x - D) / sigma (Karras et al. 2022,
    equation 3).
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoiser(x, to_device(sigma, x.device).expand(len(x)))) / coefficient(sigma, x)

    return velocity


def denoiser_from_velocity(velocity: Velocity) -> Velocity:
    """The k-diffusion denoiser of an ODE dx/dsigma = velocity(x, sigma): D = x - sigma * velocity."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x - coefficient(sigma, x) * velocity(x, sigma)

    return denoiser
