"""What K points in one batch cost.

    python -m benchmarks.speed.points [--full]

The time of a level of K points, and of a whole EPD trajectory with K points an interval, over the same with K
= 1: 1 + K evaluations an interval instead of 2, at the same serial depth.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from backends import Backend
from common.errors import run_command
from solvers import EPD, SolverTable, Spec, sample
from solvers.solver import Velocity

from ..report import result_path, text_table, write_json
from .networks import Case, Networks, condition_of, measured_on
from .timing import in_turn, ratio, shown

POINTS = (1, 2, 3, 4)
INTERVALS = 3
HEADER = [
    "family",
    "batch",
    "ms a level, K = 1",
    *[f"{what}, K = {k}" for what in ("level", "trajectory") for k in POINTS[1:]],
]


@dataclass(frozen=True)
class Jobs:
    """What is timed: one level of K points, and a whole trajectory with K points an interval."""

    velocity: Velocity
    start: Tensor
    nodes: Tensor

    @classmethod
    def make(cls, case: Case) -> "Jobs":
        """On a backbone's own schedule."""
        backend = case.backend
        velocity = backend.velocity(condition_of(backend, case.family, case.batch))
        start = backend.initial_latents(list(range(case.batch)), backend.sigma_max)
        return cls(velocity, start, backend.sigmas(Spec(num_steps=INTERVALS + 1)))

    def level(self, points: int) -> Tensor:
        """One level of some points."""
        return self.velocity(self.start.repeat(points, 1, 1, 1), self.nodes[1])

    def trajectory(self, points: int) -> Tensor:
        """An EPD trajectory with some points in each interval."""
        return sample(EPD(SolverTable.uniform(INTERVALS, points)), self.velocity, self.start, self.nodes)


def measure(case: Case, repeats: int) -> list[dict]:
    """One row for each K."""
    jobs, device = Jobs.make(case), case.backend.device
    levels = in_turn([partial(jobs.level, k) for k in POINTS], 3 * repeats, device)
    trajectories = in_turn([partial(jobs.trajectory, k) for k in POINTS], repeats, device)
    return [
        {
            "family": case.family,
            "batch": case.batch,
            "points": points,
            "depth": 2 * INTERVALS,
            "evaluations": (1 + points) * INTERVALS,
            "level": ratio(levels[i], levels[0]),
            "trajectory": ratio(trajectories[i], trajectories[0]),
            "level_seconds": levels[i].median().item(),
        }
        for i, points in enumerate(POINTS)
    ]


def summary(rows: list[dict]) -> str:
    """A line for each family and batch."""
    lines = []
    for name, size in dict.fromkeys((r["family"], r["batch"]) for r in rows):
        of_case = [r for r in rows if (r["family"], r["batch"]) == (name, size)]
        line = [name, str(size), f"{1e3 * of_case[0]['level_seconds']:.1f}"]
        lines.append(line + [shown(r[what]) for what in ("level", "trajectory") for r in of_case[1:]])
    return text_table(HEADER, lines)


@click.command()
@measured_on
def main(networks: Networks, batch, repeats: int, device, out: Path | None) -> None:
    """Time levels and trajectories of 1 to 4 points on every family."""
    networks.check()
    rows: list[dict] = []

    def work(name: str, backend: Backend) -> list[dict]:
        return [row for size in batch for row in measure(Case(backend, name, size), repeats)]

    with torch.inference_mode():
        for of_family in networks.each(work, device):
            rows += of_family
            write_json(
                result_path("points", networks.kind, out),
                networks.settings() | {"repeats": repeats},
                rows,
                device,
            )
    click.echo(summary(rows))


if __name__ == "__main__":
    run_command(main)
