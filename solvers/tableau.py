"""Any sampler as one explicit tableau over the whole trajectory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .solver import Solver, sample


@dataclass(frozen=True)
class Tableau(Solver):
    """An explicit Runge-Kutta tableau from the first node to the last (Butcher 2016, section 230).

    Stage s evaluates g_s = velocity(stages[s, 0] x_0 + sum_j stages[s, 1 + j] g_j, sigmas[s]) with j < s, and
    the result is output[0] x_0 + sum_j output[1 + j] g_j. Stages that do not depend on each other form a
    level and go into one batch: `depth` levels are the serial depth, `evaluations` counts the stages.

    sigmas [S], stages [S, S + 1], output [S + 1] in float64; levels hold the stage numbers in order; `nodes`
    are those it was made for, if known: it runs on no others.
    """

    sigmas: Tensor
    stages: Tensor
    output: Tensor
    levels: tuple[tuple[int, ...], ...]
    nodes: Tensor | None = None

    def __post_init__(self):
        s = len(self.sigmas)
        if self.stages.shape != (s, s + 1) or self.output.shape != (s + 1,):
            raise ValueError(
                f"tableau: stages {list(self.stages.shape)} and output {list(self.output.shape)} do not fit"
                f" {s} sigmas"
            )
        done: set[int] = set()
        for level in self.levels:
            needed = self.stages[list(level), 1:].nonzero()[:, 1].tolist()
            if not done.issuperset(needed):
                raise ValueError("tableau: a stage uses a gradient of its own or a later level")
            done.update(level)
        if done != set(range(s)) or sum(map(len, self.levels)) != s:
            raise ValueError("tableau: the levels do not hold each stage once")

    @property
    def depth(self) -> int:
        return len(self.levels)

    @property
    def evaluations(self) -> int:
        return len(self.sigmas)

    def check(self, sigmas):
        if self.nodes is not None and not torch.equal(sigmas, self.nodes):
            raise ValueError(f"tableau: made for nodes {self.nodes.tolist()}, not for {sigmas.tolist()}")

    def num_steps(self, sigmas):
        return 1

    def bind(self, sigmas):
        rows = [_terms(row) for row in self.stages]
        levels = tuple((self.sigmas[list(level)], tuple(rows[s] for s in level)) for level in self.levels)
        return _BoundTableau(self, levels, _terms(self.output))

    def step(self, velocity, x, sigmas, n, history):
        return self.bind(sigmas).step(velocity, x, sigmas, n, history)


Terms = tuple[tuple[int, float | Tensor], ...]


@dataclass(frozen=True)
class _BoundTableau(Solver):
    """A tableau with its rows as terms: the noise levels and rows of each level, and the output row."""

    tableau: Tableau
    levels: tuple[tuple[Tensor, tuple[Terms, ...]], ...]
    output: Terms

    def step(self, velocity, x, sigmas, n, history):
        values: list[Tensor | None] = [x, *[None] * self.tableau.evaluations]
        for numbers, (levels, rows) in zip(self.tableau.levels, self.levels, strict=True):
            velocities = velocity(
                torch.cat([_combine(row, values) for row in rows]), levels.repeat_interleave(len(x))
            )
            for s, slope in zip(numbers, velocities.split(len(x)), strict=True):
                values[1 + s] = slope
        return _combine(self.output, values), ()


def _terms(row: Tensor) -> Terms:
    """The start's entry of a row, and those after it that are not 0; numbers, or tensors where they are
    learned.
    """
    known = row.tolist()
    weights = row.unbind() if row.requires_grad else known
    return tuple((j, weights[j]) for j, value in enumerate(known) if j == 0 or value != 0)


def _combine(terms: Terms, values: list[Tensor | None]) -> Tensor:
    """The sum of weight x value."""
    (first, weight), *others = terms
    total = weight * values[first]
    for j, weight in others:
        total = (
            torch.add(total, values[j], alpha=weight)
            if isinstance(weight, float)
            else total + weight * values[j]
        )
    return total


def compile_tableau(solver: Solver, sigmas: Tensor, finish: str = "none") -> Tableau:
    """The tableau of a solver on the nodes sigmas [N], found by running its own code on coordinate vectors.

    The start is the vector e_0 and the s-th evaluation returns e_{1+s}: what goes into it is row s of the
    tableau. Tables per image have no single tableau: ValueError.
    """
    evaluations = 0

    def count(x, sigma):
        nonlocal evaluations
        evaluations += len(x)
        return torch.zeros_like(x)

    start = torch.ones(1, 1, dtype=torch.float64)
    sample(solver, count, start, sigmas, finish=finish)

    basis = torch.eye(1 + evaluations, dtype=torch.float64)
    rows: list[Tensor] = []
    times: list[Tensor] = []

    def record(x, sigma):
        first = 1 + len(rows)
        rows.extend(x.detach())
        times.extend(sigma.detach().expand(len(x)))
        return basis[first : first + len(x)]

    output = sample(solver, record, basis[:1], sigmas, finish=finish)[0].detach()
    stages = torch.stack(rows) if rows else basis[:0]
    stage_sigmas = torch.stack(times) if times else output[:0]
    nodes = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    return Tableau(stage_sigmas, stages, output, _levels(stages), nodes)


def _levels(stages: Tensor) -> tuple[tuple[int, ...], ...]:
    """Each stage one level after the last that it depends on."""
    level: list[int] = []
    for row in stages:
        level.append(1 + max((level[j] for j in row[1:].nonzero()[:, 0].tolist()), default=-1))
    return tuple(tuple(s for s, at in enumerate(level) if at == i) for i in range(max(level, default=-1) + 1))
