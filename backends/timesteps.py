"""From noise levels to what a network gets of them: timesteps and input scales."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.solver import to_device


class TimestepCache:
    """What a network gets of noise levels sigma [] or [M*B] for some rows, computed once and kept on the
    device.

    `compute(sigma [rows])` -> tensors, in float64 on the host. Noise levels that are being learned are
    computed anew at each call.
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
