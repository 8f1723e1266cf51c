"""From a configuration to a student: where it starts, and the solver that its present parameters describe."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from backends import check_backbone_known
from solvers import (
    EPD,
    Predictor,
    Solver,
    SolverTable,
    Spec,
    Tableau,
    compile_tableau,
    load_predictor,
    resolve_predictor_path,
)
from solvers.predictor.spec import require_match

from ...config import ConfigError
from ..config import DistillConfig, StudentConfig
from .parameters import TableauStudent, TableStudent

LOW_POINTS = (-2.5, -0.5)  # logits of the first and last of the points of a "low" start


@dataclass(frozen=True)
class Student:
    """A module of unconstrained parameters as a solver on nodes, and as a predictor."""

    module: TableStudent | TableauStudent
    config: StudentConfig
    spec: Spec
    nodes: Tensor
    parallel: bool
    parent: str

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad and p.numel()]

    def solver(self) -> tuple[Solver, Tensor]:
        """The solver of the present parameters and its nodes, with gradients to the parameters."""
        if isinstance(self.module, TableauStudent):
            return self.module.tableau(), self.nodes
        learned = self.module.nodes()
        return EPD(self.module.table(), self.config.afs, self.config.max_order, self.parallel), (
            self.nodes if learned is None else learned
        )

    def cost(self) -> Tableau:
        """The compiled tableau, for depth and evaluations."""
        with torch.no_grad():
            return compile_tableau(*self.solver())

    def predictor(self, provenance: dict) -> Predictor:
        """The present parameters as a predictor."""
        with torch.no_grad():
            solver, nodes = self.solver()
        table = solver if isinstance(solver, Tableau) else solver.table
        return Predictor(table, self.spec, nodes.detach(), provenance | {"parent": self.parent})


def load_start(config: DistillConfig) -> tuple[Predictor, str] | None:
    """The predictor to start from and what to call it, or None if the start is not a predictor; a misfit:
    ConfigError.
    """
    student, nodes = config.student, config.nodes
    if student.start in ("equal", "low", "baseline"):
        return None
    path = resolve_predictor_path(student.start)
    predictor = load_predictor(path)
    spec = predictor.spec
    check_backbone_known(spec, path)
    facts: dict[str, tuple] = {"backend.name": (config.backend.name, spec.backend)}
    if student.kind == "table":
        if isinstance(predictor.table, Tableau):
            raise ConfigError(f"student.start {path} holds a tableau; set student.kind to tableau")
        facts |= {
            "nodes.num_steps": (nodes.num_steps, predictor.table.num_intervals + 1),
            "nodes.schedule": (nodes.schedule, spec.schedule_type),
            "student.num_points": (student.num_points, predictor.table.num_points),
            "student.afs": (student.afs, spec.afs),
            "student.max_order": (student.max_order, spec.max_order),
        }
    elif predictor.sigmas is None:
        raise ConfigError(
            f"student.start {path} does not hold its nodes, which a tableau needs; distil a table from it"
            " first"
        )
    require_match(facts, f"student.start {path}")
    return predictor, f"{path.name} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def table_start(config: DistillConfig, loaded: tuple[Predictor, str] | None) -> tuple[SolverTable, str]:
    """The table that a table student starts from, and what to call it."""
    student, intervals = config.student, config.nodes.num_steps - 1
    if loaded is not None:
        return loaded[0].table, loaded[1]
    table = SolverTable.uniform(intervals, student.num_points)
    if student.start == "low":
        table = replace(
            table,
            r=torch.linspace(*LOW_POINTS, student.num_points, dtype=torch.float64)
            .sigmoid()
            .expand(intervals, -1)
            .clone(),
        )
    return table, f"{student.start} points, equal weights"


def table_student(
    config: DistillConfig, spec: Spec, nodes: Tensor, loaded: tuple[Predictor, str] | None
) -> Student:
    """A student that is an EPD or EPD-Plugin table on `nodes`."""
    student = config.student
    start, parent = table_start(config, loaded)
    try:
        module = TableStudent(
            start, student.scale_dir, student.scale_time, nodes if student.learn_sigmas else None
        )
    except ValueError as error:
        raise ConfigError(f"student.{error}") from None
    names = {
        "solver": "epd",
        "num_points": student.num_points,
        "afs": student.afs,
        "max_order": student.max_order,
    }
    return Student(module, student, replace(spec, **names), nodes, config.train.parallel_points, parent)


@dataclass(frozen=True)
class TableauStart:
    """A tableau to learn from: its nodes and schedule, what to call it, and its mean RMSE to the teacher."""

    tableau: Tableau
    schedule: str | None
    parent: str
    error: float


def tableau_student(config: DistillConfig, spec: Spec, start: TableauStart, gram: Tensor) -> Student:
    """A student that is a whole tableau; `gram` holds the second moments of its start's states
    (student.second_moments).
    """
    student, nodes = config.student, start.tableau.nodes
    module = TableauStudent(start.tableau, student.learn_sigmas, gram, student.resolution * start.error)
    spec = replace(
        spec, solver="tableau", num_steps=len(nodes), num_points=None, schedule_type=start.schedule
    )
    return Student(module, student, spec, nodes, config.train.parallel_points, start.parent)
