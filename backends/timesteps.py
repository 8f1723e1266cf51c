"""From noise levels to the timesteps and input scales that a network gets."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.solver import to_device


class TimestepCache:
    """Timesteps and scales of noise levels sigma [] or [M*B], computed once and kept on the device.

    So no step of a solver waits for a copy to the device. Noise levels that are being learned are computed
    anew at each call.

    Args:
        compute: compute(sigma [rows] float64 on the host) -> tensors.
        device: where they are kept.
        limit: entries, after which all are dropped.
    """

    def __init__(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device, limit: int = 1024
    ):
        self.compute, self.device, self.limit = compute, device, limit
        self.known: dict[tuple[float, ...], tuple[Tensor, ...]] = {}

    def __call__(self, sigma: Tensor, rows: int) -> tuple[Tensor, ...]:
        if sigma.requires_grad and torch.is_grad_enabled():
            return self._on_device(sigma, rows)
        key = (rows, *sigma.reshape(-1).tolist())
        if key not in self.known:
            if len(self.known) >= self.limit:
                self.known.clear()
            with torch.inference_mode(False), torch.no_grad():  # kept for callers that differentiate as well
                self.known[key] = self._on_device(sigma, rows)
        return self.known[key]

    def _on_device(self, sigma: Tensor, rows: int) -> tuple[Tensor, ...]:
        return tuple(to_device(t, self.device) for t in self.compute(sigma.double().cpu().expand(rows)))


def flow_timesteps(sigma: Tensor) -> tuple[Tensor]:
    """The timesteps of a flow-matching network: 1000 sigma, in float32."""
    return ((1000 * sigma).float(),)
