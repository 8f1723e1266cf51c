"""Any sampler as one explicit tableau over the whole trajectory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .solver import Solver, coefficient, sample


@dataclass(frozen=True)
class Tableau(Solver):
    """An explicit Runge-Kutta tableau over the whole trajectory (Butcher 2016, section 230).

        x_s = stages[s, 0] x_0 + sum_{j < s} stages[s, 1 + j] g_j,    g_s = velocity(x_s, sigmas[s])
        x   = output[0] x_0 + sum_s output[1 + s] g_s

                 1   g_0   g_1  ...
    sigmas[0] |  1                        each row of `stages`: what the velocity of stage s is evaluated at
    sigmas[1] |  .    .
    sigmas[2] |  .    .     .
              +-----------------
                 .    .     .    .        `output`: the result

    Stages that do not depend on each other form a level and go into one batch: `depth` levels are the serial
    depth, `evaluations` counts the stages (NFE).

    sigmas [..., S], stages [..., S, S + 1], output [..., S + 1] in float64; leading dimensions hold one
    tableau per image. `levels` hold the stage numbers in order; `nodes` are the ones it was made for, if
    known: it runs on no others.
    """

    sigmas: Tensor
    stages: Tensor
    output: Tensor
    levels: tuple[tuple[int, ...], ...]
    nodes: Tensor | None = None

    def __post_init__(self):
        *images, s = self.sigmas.shape
        if self.stages.shape != (*images, s, s + 1) or self.output.shape != (*images, s + 1):
            raise ValueError(
                f"tableau: stages {list(self.stages.shape)} and output {list(self.output.shape)} do not fit"
                f" sigmas {list(self.sigmas.shape)}"
            )
        used = (self.stages.detach() != 0).flatten(0, -3).any(0) if images else self.stages.detach() != 0
        done: set[int] = set()
        for level in self.levels:
            needed = used[list(level), 1:].nonzero()[:, 1].tolist()
            if not done.issuperset(needed):
                raise ValueError("tableau: a stage uses a velocity of its own or a later level")
            done.update(level)
        if done != set(range(s)) or sum(map(len, self.levels)) != s:
            raise ValueError("tableau: the levels do not hold each stage once")

    @property
    def depth(self) -> int:
        return len(self.levels)

    @property
    def evaluations(self) -> int:
        return self.sigmas.shape[-1]

    def check(self, sigmas):
        if self.nodes is not None and not torch.equal(sigmas, self.nodes):
            raise ValueError(f"tableau: made for nodes {self.nodes.tolist()}, not for {sigmas.tolist()}")

    def num_steps(self, sigmas):
        return 1

    def bind(self, sigmas):
        rows = [_terms(row) for row in self.stages.unbind(-2)]
        levels = tuple(
            (self.sigmas[..., list(level)], tuple(rows[s] for s in level)) for level in self.levels
        )
        return _BoundTableau(self, levels, _terms(self.output))

    def step(self, velocity, x, sigmas, n, history):
        return self.bind(sigmas).step(velocity, x, sigmas, n, history)


Terms = tuple[tuple[int, float | Tensor], ...]


@dataclass(frozen=True)
class _BoundTableau(Solver):
    """A tableau with its rows as terms: sigmas and rows of each level, and the output row."""

    tableau: Tableau
    levels: tuple[tuple[Tensor, tuple[Terms, ...]], ...]
    output: Terms

    def step(self, velocity, x, sigmas, n, history):
        images = self.tableau.sigmas.shape[:-1]
        if images and images != (len(x),):
            raise ValueError(f"tableau: one for each of {list(images)} images, but there are {len(x)}")
        values: dict[int, Tensor] = {0: x}  # of x_0 and, at 1 + s, of g_s
        for numbers, (level_sigmas, rows) in zip(self.tableau.levels, self.levels, strict=True):
            inputs = torch.cat([_combine(row, values) for row in rows])
            row_sigmas = level_sigmas.expand(len(x), -1).T.reshape(-1)
            velocities = velocity(inputs, row_sigmas).split(len(x))
            values.update((1 + s, g) for s, g in zip(numbers, velocities, strict=True))
        return _combine(self.output, values), ()


def _terms(row: Tensor) -> Terms:
    """The entry of x_0, and the others that are not 0: numbers, or tensors where they are learned or per
    image.
    """
    used = (
        (row.detach() != 0).flatten(0, -2).any(0).tolist() if row.ndim > 1 else (row.detach() != 0).tolist()
    )
    weights = row.unbind(-1) if row.requires_grad or row.ndim > 1 else row.tolist()
    return tuple((j, weights[j]) for j, is_used in enumerate(used) if j == 0 or is_used)


def _combine(terms: Terms, values: dict[int, Tensor]) -> Tensor:
    """The sum of weight x value."""
    (first, weight), *others = terms
    total = _scaled(values[first], weight)
    for j, weight in others:
        if isinstance(weight, float):
            total = torch.add(total, values[j], alpha=weight)
        else:
            total = total + _scaled(values[j], weight)
    return total


def _scaled(value: Tensor, weight: float | Tensor) -> Tensor:
    return value * (weight if isinstance(weight, float) else coefficient(weight, value))


def compile_tableau(solver: Solver, sigmas: Tensor, finish: str = "none") -> Tableau:
    """The tableau of a solver on the nodes sigmas [N], from running its own code on coordinate vectors.

    The start is the vector e_0 and the s-th evaluation returns e_{1+s}: what goes into it is row s of the
    tableau. Tables per image have no single tableau: ValueError.
    """
    basis = torch.eye(1 + count_evaluations(solver, sigmas, finish), dtype=torch.float64)
    rows: list[Tensor] = []
    row_sigmas: list[Tensor] = []

    def record(x: Tensor, sigma: Tensor) -> Tensor:
        first = 1 + len(rows)
        rows.extend(x.detach())
        row_sigmas.extend(sigma.detach().expand(len(x)))
        return basis[first : first + len(x)]

    output = sample(solver, record, basis[:1], sigmas, finish=finish)[0].detach()
    stages = torch.stack(rows) if rows else basis[:0]
    stage_sigmas = torch.stack(row_sigmas) if row_sigmas else output[:0]
    nodes = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    return Tableau(stage_sigmas, stages, output, _levels(stages), nodes)


def count_evaluations(solver: Solver, sigmas: Tensor, finish: str = "none") -> int:
    """The NFE of a solver on nodes: how many rows it asks the velocity for, for one image."""
    count = 0

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal count
        count += len(x)
        return torch.zeros_like(x)

    sample(solver, velocity, torch.ones(1, 1, dtype=torch.float64), sigmas, finish=finish)
    return count


def _levels(stages: Tensor) -> tuple[tuple[int, ...], ...]:
    """Each stage one level after the last that it depends on."""
    level: list[int] = []
    for row in stages:
        level.append(1 + max((level[j] for j in row[1:].nonzero()[:, 0].tolist()), default=-1))
    return tuple(tuple(s for s, at in enumerate(level) if at == i) for i in range(max(level, default=-1) + 1))
