"""A student that is a whole Butcher tableau."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from backends.parallel import ParallelEvaluator
from solvers import BASELINES, Spec, Tableau, compile_tableau
from solvers.solver import Velocity

from ...config import ConfigError
from ...start import Start
from ..bank import Bank
from ..config import DistillConfig, StudentConfig
from .student import SMALLEST, LearnedModule, Student, StudentData, StudentKind
from .widen import denoised_weights, widen

MOMENT_PAIRS = 32  # training pairs off whose states the second moments of a start are read


class TableauStudent(LearnedModule):
    """A tableau whose rows and, with `learn_sigmas`, noise levels are learned; its levels of stages stay.

    A stage's input is written as x_s = a_s x_0 + sum_j b_sj D_j with the denoised states D_j = x_j - sigma_j
    g_j of earlier levels (data prediction, as in DPM-Solver++, arXiv 2211.01095, section 4), and so is the
    result; any solver of the same levels is in reach. The denoised states are much alike, so each row is
    learned in the principal axes of `gram` [S + 1, S + 1], the second moments of x_0, D_1, ..., D_S along the
    start's own trajectories: a unit of any parameter then moves its state by one RMS, and one learning rate
    suits all. Axes of an RMS below `moment_damping` are moved by less. The first level sees x_0 itself, or
    x_0 scaled down to the noise level of the stage.
    """

    weights: Tensor
    axes: Tensor
    sigma_units: Tensor

    def __init__(
        self,
        start: Tableau,
        learn_sigmas: bool = False,
        gram: Tensor | None = None,
        moment_damping: float = 1e-3,
    ):
        super().__init__()
        count = 1 + start.evaluations
        gram = torch.eye(count, dtype=torch.float64) if gram is None else gram
        self.start = start
        self.register_buffer("weights", denoised_weights(start))
        self.register_buffer(
            "axes", torch.stack([self._axes(gram, row, moment_damping) for row in range(count)])
        )
        self.register_buffer("sigma_units", _sigma_units(start, gram))
        self.row_change = nn.Parameter(torch.zeros(count, count, dtype=torch.float64))
        self.log_sigma_change = nn.Parameter(torch.zeros_like(start.sigmas), requires_grad=learn_sigmas)

    def _axes(self, gram: Tensor, row: int, moment_damping: float) -> Tensor:
        """The directions [S + 1, S + 1] in which a row is learned, one a column; 0 where it has fewer."""
        usable = usable_terms(self.start, row)
        axes = torch.zeros_like(gram)
        if usable:
            moments, directions = torch.linalg.eigh(gram[usable][:, usable])
            axes[usable, : len(usable)] = directions / (moments.clamp(min=0) + moment_damping**2).sqrt()
        return axes

    def learned(self) -> Tableau:
        factor = (self.sigma_units * self.log_sigma_change).exp()
        weights = self.weights + (self.axes @ self.row_change[:, :, None])[..., 0]
        sigmas, rows = velocity_rows(self.start, weights, factor)
        return Tableau(sigmas, rows[:-1], rows[-1], self.start.levels, self.start.nodes)

    def distance(self) -> Tensor:
        return torch.cat([self.row_change.flatten(), self.log_sigma_change]).square().mean()


def velocity_rows(start: Tableau, weights: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of denoised states as rows of velocities.

    Args:
        start: the tableau whose levels hold.
        weights: [..., S + 1, S + 1], each stage row and the output row as weights of x_0 and D_1, ..., D_S.
        factor: [..., S], of the start's sigmas.

    Returns:
        sigmas [..., S], and the rows [..., S + 1, S + 1] as weights of x_0 and g_1, ..., g_S.
    """
    count, sigmas = start.evaluations, start.sigmas * factor
    # an input is as noisy as its noise level says
    noise = weights[..., 0] * torch.cat([factor, torch.ones_like(factor[..., :1])], -1)
    unit = torch.eye(1 + count, dtype=torch.float64)
    rows: dict[int, Tensor] = {}
    denoised: dict[int, Tensor] = {}
    for s in [*[s for level in start.levels for s in level], count]:
        terms = [weights[..., s, j, None] * denoised[j - 1] for j in usable_terms(start, s)[1:]]
        rows[s] = sum(terms, noise[..., s, None] * unit[0])
        if s < count:
            denoised[s] = rows[s] - sigmas[..., s, None] * unit[1 + s]
    return sigmas, torch.stack([rows[s] for s in range(count + 1)], -2)


def usable_terms(tableau: Tableau, row: int) -> list[int]:
    """What a row may combine: 0 for x_0 and 1 + j for D_j of the levels before its own; nothing in the first
    level.
    """
    done: list[int] = []
    for level in tableau.levels:
        if row in level:
            break
        done += level
    return [0, *sorted(1 + s for s in done)] if done else []


def _sigma_units(start: Tableau, gram: Tensor) -> Tensor:
    """Changes of log sigma [S] that change a stage's denoised state by about one RMS, at most 10; 0 where it
    sees x_0 itself.
    """
    units = torch.zeros_like(start.sigmas)
    for n, (level, after) in enumerate(zip(start.levels, [*start.levels[1:], None], strict=True)):
        for s in [s for s in level if n or start.stages[s, 0] != 1]:
            # the last level has none after it: as far as from the one before
            near = after[0] if after else start.levels[-2][0]
            apart = (
                (gram[1 + s, 1 + s] + gram[1 + near, 1 + near] - 2 * gram[1 + s, 1 + near])
                .clamp(min=SMALLEST)
                .sqrt()
            )
            units[s] = ((start.sigmas[near] / start.sigmas[s]).log().abs() / apart).clamp(0.1, 10.0)
    return units


def second_moments(tableau: Tableau, velocity: Velocity, x: Tensor) -> Tensor:
    """The mean products [S + 1, S + 1] of the entries of x_0 [B, ...] and the denoised states D_1, ..., D_S
    of a tableau.
    """
    denoised: list[Tensor] = []

    def record(inputs: Tensor, sigma: Tensor) -> Tensor:
        velocities = velocity(inputs, sigma)
        outputs = inputs - sigma.expand(len(inputs)).view(-1, *[1] * (inputs.ndim - 1)) * velocities
        denoised.extend(outputs.double().split(len(x)))
        return velocities

    tableau.step(record, x, tableau.sigmas, 0, ())
    order = [s for level in tableau.levels for s in level]
    states = torch.stack([x.double(), *[denoised[order.index(s)] for s in range(len(order))]]).flatten(1)
    return (states @ states.T / states.shape[1]).cpu()


@dataclass(frozen=True)
class TableauStart:
    """A tableau to learn from: its schedule, what to call it, and its mean RMSE to the teacher."""

    tableau: Tableau
    schedule: str | None
    parent: str
    error: float


class TableauKind(StudentKind):
    """student.kind: tableau."""

    name, start_names, fixed_nodes = "tableau", ("baseline",), False

    def check(self, config: DistillConfig) -> None:
        student = config.student
        if student.start == "baseline" and student.depth is None:
            raise ConfigError(
                "student.depth is not set: a tableau that starts from a baseline needs its serial depth"
            )
        if student.start in ("equal", "low"):
            raise ConfigError(
                f'student.start is {student.start!r}, but a tableau starts from "baseline" or a predictor'
            )

    def start_facts(self, config: DistillConfig, start: Start) -> dict[str, tuple[object, object]]:
        if start.predictor.sigmas is None:
            raise ConfigError(
                f"student.start {start.path} does not hold its nodes, which a tableau needs; distil a table"
                " from it first"
            )
        return {}

    def num_steps(self, config: DistillConfig) -> int:
        return 1

    def cost(self, config: DistillConfig, start: Start | None) -> Tableau:
        if start is not None:
            tableau = tableau_of(start)
            return widened(tableau, config.student) if config.student.widen else tableau
        assert config.student.depth is not None  # check
        nodes = torch.linspace(2, 1, config.student.depth + 1, dtype=torch.float64)
        return widened(compile_tableau(BASELINES["euler"], nodes), config.student)

    def make(self, config: DistillConfig, spec: Spec, data: StudentData) -> Student:
        student, start = config.student, tableau_start(config, data)
        nodes = start.tableau.nodes
        assert nodes is not None  # compile_tableau and widen keep them
        gram = data.baselines.errors.processes.ranks.broadcast(
            start_moments(config, start.tableau, data.train)
        )
        module = TableauStudent(
            start.tableau, student.learn_sigmas, gram, student.moment_damping * start.error
        )
        spec = replace(
            spec, solver="tableau", num_steps=len(nodes), num_points=None, schedule_type=start.schedule
        )
        return Student(module, spec, nodes, start.parent, config.train.parallel_points, start.error)


def tableau_of(start: Start) -> Tableau:
    """The tableau of a predictor on its nodes."""
    assert start.predictor.sigmas is not None  # start_facts has checked it
    return compile_tableau(start.predictor.solver(), start.predictor.sigmas)


def widened(tableau: Tableau, student: StudentConfig) -> Tableau:
    """A tableau with the idle stages that a configuration asks for."""
    return widen(tableau, student.num_points, student.stride, student.first_points)


def tableau_start(config: DistillConfig, data: StudentData) -> TableauStart:
    """The tableau of the start predictor, or of the best baseline of the configured depth, with idle stages
    to learn.
    """
    tuning, student, baselines = config.evaluation.tuning_pairs, config.student, data.baselines
    if data.start is not None:
        predictor = data.start.predictor
        assert predictor.sigmas is not None  # start_facts has checked it
        error = baselines.errors(data.train, predictor.solver(), predictor.sigmas, tuning).mean().item()
        tableau = tableau_of(data.start)
        if student.widen:
            tableau = widened(tableau, student)
        return TableauStart(tableau, predictor.spec.schedule_type, data.start.parent, error)
    assert student.depth is not None  # check
    matched = [option for option, _ in baselines.at(student.depth).values()]
    if not matched:
        raise ConfigError(
            f"student.depth {student.depth}: no baseline of evaluation.baselines has this serial depth"
        )
    best = matched[0]
    return TableauStart(
        widened(compile_tableau(best.solver, best.nodes), student),
        best.schedule,
        f"{best.name} on {best.schedule} nodes",
        baselines.cached(data.train, best, tuning).mean().item(),
    )


def start_moments(config: DistillConfig, tableau: Tableau, train: Bank) -> Tensor:
    """The second moments [S + 1, S + 1] of the states along a start's trajectories on some training pairs."""
    count, chunk = min(MOMENT_PAIRS, len(train)), min(config.train.chunk, MOMENT_PAIRS)
    gram = torch.zeros(tableau.evaluations + 1, tableau.evaluations + 1, dtype=torch.float64)
    points = ParallelEvaluator()
    with torch.no_grad():
        for i in range(0, count, chunk):
            condition, x, _ = train.rows(list(range(i, min(i + chunk, count))))
            gram += second_moments(tableau, points.velocity(train.backend, condition), x) * len(x) / count
    return gram
