"""What the policies over learned tables have in common."""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from solvers import SolverTable, Tableau


class Draw(Protocol):
    """Sampled numbers of tables, one table an image; iterates over what log_prob takes."""

    def select(self, rows: slice | list[int]) -> Any:
        """The numbers of some images."""

    def __iter__(self) -> Any: ...


class Distribution(Protocol):
    """A distribution of tables, with its density in closed form."""

    def sample(self, batch: int, seed: int) -> Any:
        """`batch` draws, which depend on the distribution and the seed alone."""

    def log_prob(self, *numbers: Any) -> Tensor:
        """Log density [batch] of a draw's numbers."""

    def entropy(self) -> Tensor:
        """Differential entropy."""

    def kl(self, other: Any) -> Tensor:
        """KL(self || other)."""


class Policy(nn.Module, ABC):
    """A distribution of tables around a start's, moved by parameters that are zero at first."""

    narrower: str
    """What a user sets for draws that are more alike."""

    @abstractmethod
    def forward(self) -> Distribution:
        """The distribution of the present parameters."""

    @abstractmethod
    def base(self) -> Distribution:
        """The distribution around the start."""

    @abstractmethod
    def learned(self, draw: Any) -> SolverTable | Tableau:
        """The tables of a draw, one an image."""

    @abstractmethod
    def mean(self) -> SolverTable | Tableau:
        """The table at the mean: what is exported."""

    @abstractmethod
    def start_mean(self) -> SolverTable | Tableau:
        """The table at the mean of the start."""

    @abstractmethod
    def drift(self) -> dict[str, float]:
        """How far the mean is from the start's, for the metrics."""

    @abstractmethod
    def describe(self, learned: Any) -> dict[str, list]:
        """A table's numbers, for an evaluation record."""

    @abstractmethod
    def drawn_numbers(self, draw: Any, image: int) -> dict[str, list]:
        """What was drawn for an image, for the record of a skipped step."""

    @abstractmethod
    def residual_parameters(self) -> list[nn.Parameter]:
        """The parameters in which the distance from the start is linear."""

    def shrink(self, factor: float) -> None:
        """Move the parameters towards the start's: `factor` of the way is left."""
        with torch.no_grad():
            for parameter in self.residual_parameters():
                parameter.mul_(factor)

    def provenance(self) -> dict:
        """What was measured for the policy: nothing, unless a policy says so."""
        return {}


def same_numbers(learned: SolverTable | Tableau, start: SolverTable | Tableau) -> bool:
    """Whether two tables, or two tableaus of the same levels, hold the same numbers."""
    pairs = [(value, vars(learned)[name]) for name, value in vars(start).items() if isinstance(value, Tensor)]
    return all(torch.equal(a, b) for a, b in pairs)
