"""Linear multistep: iPNDM and the Adams-Bashforth extrapolation that EPD-Plugin shares. One evaluation a
step.
"""

from dataclasses import dataclass

from torch import Tensor

from .single_step import first_velocity
from .solver import Solver

# Adams-Bashforth weights of orders 1 to 4 for equal steps, newest velocity first
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def extrapolate(newest: Tensor, history: tuple, max_order: int) -> tuple[Tensor, tuple]:
    """The Adams-Bashforth combination of a velocity and the earlier ones in `history`, and the new
    history.
    """
    velocities = (newest, *history)[:max_order]
    weights = ADAMS_BASHFORTH[len(velocities) - 1]
    combined = sum(a * d for a, d in zip(weights, velocities, strict=True)) if len(velocities) > 1 else newest
    return combined, velocities[: max_order - 1]


def check_order(name: str, order: int, highest: int) -> None:
    if order not in range(1, highest + 1):
        raise ValueError(f"{name}: order {order}, expected 1 to {highest}")


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM (Zhang and Chen 2023, DEIS, section 3.4): Adams-Bashforth weights for equal steps, whatever the
    nodes.
    """

    max_order: int = 4
    afs: bool = False

    def __post_init__(self):
        check_order("IPNDM", self.max_order, len(ADAMS_BASHFORTH))

    def step(self, velocity, x, sigmas, n, history):
        d = first_velocity(velocity, x, sigmas, n, self.afs)
        e, history = extrapolate(d, history, self.max_order)
        return x + (sigmas[n + 1] - sigmas[n]) * e, history
