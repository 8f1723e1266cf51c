"""A student that is an EPD or EPD-Plugin table."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from solvers import EPD, SolverTable, Spec, Tableau, compile_tableau

from ...config import ConfigError
from ...start import Start
from ..config import DistillConfig
from .student import SMALLEST, LearnedModule, Student, StudentData, StudentKind

LOW_POINTS = (-2.5, -0.5)  # logits of the first and last of the points of a "low" start


class TableStudent(LearnedModule):
    """An EPD table in unconstrained float64 parameters (EPD-Solver, arXiv 2512.22796, with sorted positions).

    Positions are the cumulated softmax of K + 1 gap logits, weights a softmax, scales 2 h sigmoid(p / 2) + 1
    - h in (1 - h, 1 + h) for a half-range h; h = 0 leaves a scale out. Given `nodes` [N + 1], these are
    learned as well, between their fixed ends, as the softmax of the logits of their gaps. It starts exactly
    at `start` [N, K] (gaps and weights below 1e-6 raised to it); a scale of the start that h cannot reach:
    ValueError.
    """

    def __init__(
        self, start: SolverTable, scale_dir: float = 0.0, scale_time: float = 0.0, nodes: Tensor | None = None
    ):
        super().__init__()
        start = SolverTable.sorted(**start.arrays())
        self.gap_logits = nn.Parameter(start.gaps().clamp(min=SMALLEST).log())
        self.weight_logits = nn.Parameter(start.w.clamp(min=SMALLEST).log())
        self.half_ranges = {"scale_dir": scale_dir, "scale_time": scale_time}
        self.scales = nn.ParameterDict()
        for name, half in self.half_ranges.items():
            value = start.arrays().get(name, torch.ones_like(start.r))
            if not 0 <= half < 1:
                raise ValueError(f"{name}: half-range {half}, expected 0 <= h < 1")
            if ((value - 1).abs() > half).any():
                raise ValueError(
                    f"{name}: the start holds {value.flatten().tolist()}, outside 1 ± {half}; raise its"
                    " half-range"
                )
            if half:
                share = ((value - 1 + half) / (2 * half)).clamp(SMALLEST, 1 - SMALLEST)
                self.scales[name] = nn.Parameter(2 * torch.logit(share))
        self.ends = None if nodes is None else (nodes[0].item(), nodes[-1].item())
        if nodes is not None:
            self.node_logits = nn.Parameter((-nodes.diff()).log())

    def learned(self) -> SolverTable:
        scales = {k: 2 * h * (self.scales[k] / 2).sigmoid() + 1 - h for k, h in self.half_ranges.items() if h}
        return SolverTable.from_gaps(self.gap_logits.softmax(-1), self.weight_logits.softmax(-1), **scales)

    def nodes(self) -> Tensor | None:
        if self.ends is None:
            return None
        first, last = torch.tensor(self.ends, dtype=torch.float64)
        inner = first - (first - last) * self.node_logits.softmax(0).cumsum(0)[:-1]
        return torch.cat([first[None], inner, last[None]])


class TableKind(StudentKind):
    """student.kind: table."""

    name, start_names, fixed_nodes = "table", ("equal", "low"), True

    def check(self, config: DistillConfig) -> None:
        if config.student.start == "baseline":
            raise ConfigError(
                'student.start is "baseline", which a tableau can start from; a table starts from equal, low'
                " or a predictor"
            )
        if config.loss.start:
            raise ConfigError("loss.start holds a tableau near its start; set it to 0 for a table")

    def start_facts(self, config: DistillConfig, start: Start) -> dict[str, tuple[object, object]]:
        student, nodes, table = config.student, config.nodes, start.predictor.table
        if isinstance(table, Tableau):
            raise ConfigError(f"student.start {start.path} holds a tableau; set student.kind to tableau")
        spec = start.predictor.spec
        return {
            "nodes.num_steps": (nodes.num_steps, table.num_intervals + 1),
            "nodes.schedule": (nodes.schedule, spec.schedule_type),
            "student.num_points": (student.num_points, table.num_points),
            "student.afs": (student.afs, spec.afs),
            "student.max_order": (student.max_order, spec.max_order),
        }

    def num_steps(self, config: DistillConfig) -> int:
        return config.nodes.num_steps - 1

    def cost(self, config: DistillConfig, start: Start | None) -> Tableau:
        student, num_steps = config.student, config.nodes.num_steps
        table = SolverTable.uniform(num_steps - 1, student.num_points)
        return compile_tableau(EPD(table, student.afs, student.max_order), torch.linspace(2, 1, num_steps))

    def make(self, config: DistillConfig, spec: Spec, data: StudentData) -> Student:
        student, start = config.student, data.start
        recorded = None if start is None else start.predictor.sigmas
        nodes = data.train.backend.sigmas(spec) if recorded is None else recorded
        learned_nodes = nodes if student.learn_sigmas else None
        table, parent = (start.table, start.parent) if start else start_table(config)
        try:
            module = TableStudent(table, student.scale_dir, student.scale_time, learned_nodes)
        except ValueError as error:
            raise ConfigError(f"student.{error}") from None
        spec = replace(
            spec,
            solver="epd",
            num_points=student.num_points,
            afs=student.afs,
            max_order=student.max_order,
        )
        return Student(module, spec, nodes, parent, config.train.parallel_points)


def start_table(config: DistillConfig) -> tuple[SolverTable, str]:
    """The table of student.start "equal" or "low", and what to call it."""
    student, intervals = config.student, config.nodes.num_steps - 1
    table = SolverTable.uniform(intervals, student.num_points)
    if student.start == "low":
        points = torch.linspace(*LOW_POINTS, student.num_points, dtype=torch.float64).sigmoid()
        table = replace(table, r=points.expand(intervals, -1).clone())
    return table, f"{student.start} points, equal weights"
