"""The kinds of learned solvers that a predictor can hold: how each is stored, checked, run and printed."""

from abc import ABC, abstractmethod
from dataclasses import replace
from reprlib import repr as brief
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..epd import EPD
from ..solver import Solver
from ..table import SolverTable
from ..tableau import Tableau
from .plain_data import mapping, tensor_of
from .safe_pickle import PredictorError
from .spec import Spec

Learned = TypeVar("Learned")
MAX_EVALUATIONS = 4096  # of a file's solver: its compiled tableau is a square of them
Fact = tuple[str, object, object]  # what it is, as recorded, as it is


class LearnedKind(ABC, Generic[Learned]):
    """One kind of learned solver. `name` is its key in a predictor file, `solver_name` what the spec calls
    it.
    """

    name: str
    solver_name: str
    type: type[Learned]

    @abstractmethod
    def to_lists(self, learned: Learned) -> dict[str, Any]:
        """Its numbers as nested lists."""

    @abstractmethod
    def from_lists(self, parts: Any, sigmas: Tensor | None) -> Learned:
        """The learned solver of nested lists and the nodes of its file; anything unexpected:
        PredictorError.
        """

    @abstractmethod
    def solver(self, learned: Learned, spec: Spec, parallel: bool, max_batch: int | None) -> Solver:
        """What runs it: points in parallel or one by one, calls of at most `max_batch` rows."""

    @abstractmethod
    def num_intervals(self, learned: Learned) -> int:
        """The intervals between the nodes on which it can run."""

    def num_nodes(self, learned: Learned) -> int | None:
        """The number of nodes that it must have, None for any."""
        return None

    @abstractmethod
    def num_evaluations(self, learned: Learned) -> int:
        """An upper bound of its NFE, known without running it."""

    def facts(self, learned: Learned, spec: Spec) -> list[Fact]:
        """What the spec says of it, beside what is so."""
        return []

    def is_start(self, learned: Learned) -> bool:
        """Whether nothing was learned yet."""
        return False

    def starts(self, learned: Learned, spec: Spec) -> list[int] | None:
        """The stage at which a run may begin at each node but the last (-1: at none); None: at the first
        alone.
        """
        return None

    @abstractmethod
    def curves(self, learned: Learned) -> dict[str, Tensor]:
        """The numbers that a plot of its training shows, by name."""

    def describe(self, learned: Learned, nodes: Tensor | None) -> str:
        """Its numbers as text, or nothing where they are too many."""
        return ""


class TableKind(LearnedKind[SolverTable]):
    """An EPD table: EPD-Solver, or EPD-Plugin where spec.max_order is above 1."""

    name, solver_name, type = "table", "epd", SolverTable

    def to_lists(self, learned):
        return {k: v.detach().tolist() for k, v in learned.arrays().items()}

    def from_lists(self, parts, sigmas):
        parts = mapping(parts, "table", ("r", "w", "scale_dir", "scale_time"), required=("r", "w"))
        kept = {k: v for k, v in parts.items() if v is not None or k in "rw"}
        return SolverTable(**{k: tensor_of(v, f"table.{k}", 2) for k, v in kept.items()})

    def solver(self, learned, spec, parallel, max_batch):
        return EPD(learned, spec.afs, spec.max_order, parallel, max_batch)

    def num_intervals(self, learned):
        return learned.num_intervals

    def num_nodes(self, learned):
        return learned.num_intervals + 1

    def num_evaluations(self, learned):
        return learned.num_intervals * (1 + learned.num_points)

    def facts(self, learned, spec):
        if learned.r.ndim != 2:
            raise PredictorError(
                f"the table has shape {list(learned.r.shape)}, expected one table [intervals, points]"
            )
        return [("spec.num_points", spec.num_points, learned.num_points)]

    def is_start(self, learned):
        if learned.scale_dir is not None or learned.scale_time is not None:
            return False
        same_points = torch.equal(learned.r, learned.r[:1].expand_as(learned.r))
        return bool(same_points and (learned.w == learned.w[0, 0]).all())

    def starts(self, learned, spec):
        first = [n * (1 + learned.num_points) - (n > 0 and spec.afs) for n in range(learned.num_intervals)]
        extrapolates = spec.afs and spec.max_order > 1  # from x_0, without a velocity of its own there
        return [-1 if n and extrapolates else stage for n, stage in enumerate(first)]

    def curves(self, learned):
        return learned.arrays()

    def describe(self, learned, nodes):
        arrays, width = learned.arrays(), 8 * learned.num_points
        sigma = "" if nodes is None else "sigma             "
        lines = ["\ninterval  " + sigma + "".join(f"{name:<{width}}  " for name in arrays)]
        for n in range(learned.num_intervals):
            span = "" if nodes is None else f"{nodes[n]:7.4f} {nodes[n + 1]:9.4f} "
            cells = ("".join(f"{v:8.4f}" for v in a[n].tolist()) for a in arrays.values())
            lines.append(f"{n:8}  {span}" + "  ".join(cells))
        return "\n".join(lines)


class TableauKind(LearnedKind[Tableau]):
    """A whole Butcher tableau, from the first node to the last."""

    name, solver_name, type = "tableau", "tableau", Tableau

    def to_lists(self, learned):
        arrays = {k: vars(learned)[k].detach().tolist() for k in ("sigmas", "stages", "output")}
        return {**arrays, "levels": [list(level) for level in learned.levels]}

    def from_lists(self, parts, sigmas):
        names = ("sigmas", "stages", "output", "levels")
        parts = mapping(parts, "tableau", names, required=names)
        dimensions = (("sigmas", 1), ("stages", 2), ("output", 1))
        arrays = {name: tensor_of(parts[name], f"tableau.{name}", n) for name, n in dimensions}
        levels, count = parts["levels"], len(arrays["sigmas"])
        lists = isinstance(levels, list) and all(isinstance(level, list) for level in levels)
        if not lists or not all(type(s) is int and 0 <= s < count for level in levels for s in level):
            raise PredictorError(
                f"tableau.levels is {brief(levels)}, expected lists of stage numbers below {count}"
            )
        return replace(Tableau(**arrays, levels=tuple(map(tuple, levels))), nodes=sigmas)

    def solver(self, learned, spec, parallel, max_batch):
        return learned

    def num_intervals(self, learned):
        return 1

    def num_evaluations(self, learned):
        return learned.evaluations

    def facts(self, learned, spec):
        if learned.sigmas.ndim != 1:
            raise PredictorError(
                f"the tableau has sigmas {list(learned.sigmas.shape)}, expected one tableau [stages]"
            )
        return []

    def curves(self, learned):
        return {"sigmas": learned.sigmas, "output": learned.output}


KINDS: dict[str, LearnedKind] = {kind.name: kind for kind in (TableKind(), TableauKind())}


def kind_of(learned: Any) -> LearnedKind:
    """The kind of a learned solver."""
    return next(kind for kind in KINDS.values() if isinstance(learned, kind.type))
