"""A learned solver with all that is needed to sample with it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..schedules import flowmatch, schedule_nodes
from ..solver import Solver
from ..table import SolverTable
from ..tableau import Tableau, compile_tableau
from .kinds import LearnedKind, kind_of
from .safe_pickle import PredictorError
from .spec import Spec


@dataclass(frozen=True)
class Predictor:
    """A learned table (or a whole tableau), what it was made for, its resolved nodes and where it
    comes from.
    """

    table: SolverTable | Tableau
    spec: Spec
    sigmas: Tensor | None = None
    provenance: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """What its reader left out of a published file, in words for the user; never saved."""

    @property
    def kind(self) -> LearnedKind:
        """How its kind of learned solver is stored and run."""
        return kind_of(self.table)

    @property
    def is_start(self) -> bool:
        """Whether nothing was learned yet: a table with the same points in each interval and equal
        weights.
        """
        if self.provenance.get("kind") in ("distilled", "rdpo"):
            return False
        return self.kind.is_start(self.table)

    def notices(self) -> list[str]:
        """What a command line prints of this predictor when it uses it."""
        untrained = "a start table, in which nothing was learned yet; distil first (./launch.sh distill NAME)"
        return [*self.notes, *([untrained] if self.is_start else [])]

    def solver(self, parallel: bool = True, max_batch: int | None = None) -> Solver:
        """The solver that this predictor describes."""
        return self.kind.solver(self.table, self.spec, parallel, max_batch)

    def nodes(self, sigma_min: float | None = None, sigma_max: float | None = None) -> Tensor:
        """Its nodes [num_steps] for a denoiser of one's own: those it holds, else its schedule's.

        Args:
            sigma_min: the last node; the recorded one by default.
            sigma_max: the first node; the recorded one by default.

        Raises:
            PredictorError: the schedule needs more than its ends (discrete, or flowmatch without a shift),
                or an end is neither given nor recorded.
        """
        if self.sigmas is not None:
            return self.sigmas
        spec, steps = self.spec, self.kind.num_intervals(self.table) + 1
        if spec.schedule_type == "flowmatch" and (spec.flowmatch_mu, spec.flowmatch_shift) != (None, None):
            mu = spec.flowmatch_mu
            return flowmatch(steps, shift=spec.flowmatch_shift) if mu is None else flowmatch(steps, mu=mu)
        low = spec.sigma_min if sigma_min is None else sigma_min
        high = spec.sigma_max if sigma_max is None else sigma_max
        if low is None or high is None:
            raise PredictorError(
                "the nodes: neither sigma_min and sigma_max are given, nor does the predictor record them"
            )
        try:
            return schedule_nodes(spec.schedule_type or "none", steps, low, high, spec.schedule_rho)
        except ValueError as error:
            raise PredictorError(
                f"the nodes: {error}, or make them with solvers.discrete or solvers.flowmatch"
            ) from None

    def cost(self, finish: str = "none") -> Tableau:
        """The compiled tableau, off which depth and NFE are read; they do not depend on the nodes."""
        intervals = self.kind.num_intervals(self.table)
        nodes = torch.linspace(2, 1, intervals + 1) if self.sigmas is None else self.sigmas
        return compile_tableau(self.solver(), nodes, finish)
