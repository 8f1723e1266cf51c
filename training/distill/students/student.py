"""What distillation learns: parameters that always map to a valid solver, and the kinds of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solvers import Predictor, Solver, SolverTable, Spec, Tableau, compile_tableau
from solvers.predictor.kinds import kind_of

from ...start import Start
from ..bank import Bank
from ..baselines import Baselines
from ..config import DistillConfig

SMALLEST = 1e-6  # a gap, weight or mean square is raised to this: a finite logarithm, a direction


class LearnedModule(nn.Module, ABC):
    """Unconstrained float64 parameters of a learned solver."""

    @abstractmethod
    def learned(self) -> SolverTable | Tableau:
        """The table or tableau of the present parameters, with gradients to them."""

    def nodes(self) -> Tensor | None:
        """The learned nodes, None where they are not learned."""
        return None

    def distance(self) -> Tensor:
        """Mean squared change from the start, which loss.start holds down."""
        raise TypeError(f"{type(self).__name__} has no distance from its start")


@dataclass(frozen=True)
class Student:
    """A learned module as a solver on nodes, and as a predictor."""

    module: LearnedModule
    spec: Spec
    fixed_nodes: Tensor
    """The nodes where they are not learned."""
    parent: str
    """What it started from."""
    parallel: bool = True
    """Whether K points go into one network call."""
    lr_unit: float = 1.0
    """What train.lr is in units of."""

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad and p.numel()]

    def nodes(self) -> Tensor:
        """The present nodes, with gradients where they are learned."""
        nodes = self.module.nodes()
        return self.fixed_nodes if nodes is None else nodes

    def solver(self) -> tuple[Solver, Tensor]:
        """The solver of the present parameters and its nodes, with gradients to the parameters."""
        learned = self.module.learned()
        return kind_of(learned).solver(learned, self.spec, self.parallel, None), self.nodes()

    def cost(self) -> Tableau:
        """The compiled tableau, for depth and evaluations."""
        with torch.no_grad():
            return compile_tableau(*self.solver())

    def predictor(self, provenance: Mapping) -> Predictor:
        """The present parameters as a predictor."""
        with torch.no_grad():
            learned, nodes = self.module.learned(), self.nodes()
        return Predictor(learned, self.spec, nodes.detach(), {**provenance, "parent": self.parent})


@dataclass(frozen=True)
class StudentData:
    """What a student is made from: teacher states of training pairs, the baselines, and the predictor of
    student.start where that names one.
    """

    train: Bank
    baselines: Baselines
    start: Start | None


class StudentKind(ABC):
    """One kind of student, by its name in student.kind: what it starts from, what it costs, how it is
    made.
    """

    name: str
    start_names: tuple[str, ...]
    """Values of student.start that are no predictors."""
    fixed_nodes: bool
    """Whether it steps between the configuration's nodes, so that the loss may compare states there."""

    @abstractmethod
    def check(self, config: DistillConfig) -> None:
        """Refuse settings that make no sense for this kind: ConfigError."""

    @abstractmethod
    def start_facts(self, config: DistillConfig, start: Start) -> dict[str, tuple[object, object]]:
        """(configured, recorded) by key, which must be the same; a predictor of another kind: ConfigError."""

    @abstractmethod
    def num_steps(self, config: DistillConfig) -> int:
        """The steps of its trajectory, each with a state."""

    @abstractmethod
    def cost(self, config: DistillConfig, start: Start | None) -> Tableau:
        """A tableau of its depth and evaluations, before anything is loaded."""

    @abstractmethod
    def make(self, config: DistillConfig, spec: Spec, data: StudentData) -> Student:
        """The student at its start.

        Args:
            config: of the run.
            spec: the configuration's part of its predictor's spec.
            data: what it is made from.
        """
