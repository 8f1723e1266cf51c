"""A bound on how far a policy may move from its start table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from solvers import Solver, SolverTable, Tableau, UserError, sample

from ..processes import Processes
from .base import Policy
from .probe import Probe

TRIES = 100  # of a step back, which halves what is not finite
INSIDE = 0.999  # of the bound that a step back aims at


@dataclass
class LatentChange:
    """The RMS change of the final latents by the mean table, over their RMS, on some training prompts."""

    probe: Probe
    nodes: Tensor
    solver: Callable[[SolverTable | Tableau], Solver]
    start: list[Tensor] = field(default_factory=list)
    """The final latents of the start table, once they were needed."""

    def __call__(self, policy: Policy) -> float:
        self.start = self.start or self.final(policy.start_mean())
        pairs = [(a.double(), b.double()) for a, b in zip(self.final(policy.mean()), self.start, strict=True)]
        changed = sum((a - b).square().sum().item() for a, b in pairs)
        return (changed / sum(b.square().sum().item() for _, b in pairs)) ** 0.5

    def final(self, table: SolverTable | Tableau) -> list[Tensor]:
        """The final latents of a table."""
        solver = self.solver(table)
        with torch.inference_mode():
            return [sample(solver, velocity, x, self.nodes) for velocity, x in self.probe.parts(self.nodes)]


def divergence(policy: Policy) -> float:
    """KL(policy || base) in nats."""
    return policy().kl(policy.base()).item()


@dataclass
class Anchor:
    """A bound that is held after every step by moving the parameters back towards the start's (a projection,
    as in trust regions; no coefficient has to be found).
    """

    name: str
    """kl or latents."""
    bound: float
    measure: Callable[[Policy], float]
    processes: Processes

    def hold(self, policy: Policy) -> float:
        """Move a policy back inside the bound where it has left it; how far it is from its start then. One
        that cannot be brought inside: UserError.
        """
        power = 0.5 if self.name == "kl" else 1.0  # of the measure, as the parameters change
        for _ in range(TRIES):
            value = self.measured(policy)
            if value <= self.bound:
                return value
            policy.shrink(INSIDE * (self.bound / value) ** power if isfinite(value) else 0.5)
        raise UserError(
            f"ppo.anchor.{self.name} is {self.bound}, but the measure near the start is {value}: expected a"
            " bound above rounding, and a start table whose latents are finite"
        )

    def measured(self, policy: Policy) -> float:
        """Rank 0's measure, so that all ranks move back alike."""
        with torch.no_grad():
            return self.processes.ranks.broadcast(self.measure(policy) if self.processes.first else None)
