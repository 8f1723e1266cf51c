"""What K points in one batch cost.

    python -m benchmarks.speed.points [--full]

The time of a level of K points, and of a whole EPD trajectory with K points an interval, over the same with K
= 1: 1 + K evaluations an interval instead of 2, at the same serial depth.
"""

from pathlib import Path

import click
import torch
from torch import Tensor

from backends import Backend
from common.errors import run_command
from solvers import EPD, SolverTable, Spec, sample

from ..report import result_path, text_table, write_json
from .networks import Networks, condition_of, measured_on
from .timing import in_turn, ratio, shown

POINTS = (1, 2, 3, 4)
INTERVALS = 3
HEADER = [
    "family",
    "batch",
    "ms a level, K = 1",
    *[f"{what}, K = {k}" for what in ("level", "trajectory") for k in POINTS[1:]],
]


def measure(backend: Backend, family: str, batch: int, repeats: int) -> list[dict]:
    """One row for each K."""
    velocity = backend.velocity(condition_of(backend, family, batch))
    start, nodes = (
        backend.initial_latents(list(range(batch)), backend.sigma_max),
        backend.sigmas(Spec(num_steps=INTERVALS + 1)),
    )

    def level(points: int) -> Tensor:
        return velocity(start.repeat(points, 1, 1, 1), nodes[1])

    def whole(points: int) -> Tensor:
        return sample(EPD(SolverTable.uniform(INTERVALS, points)), velocity, start, nodes)

    levels = in_turn([lambda k=k: level(k) for k in POINTS], 3 * repeats, backend.device)
    wholes = in_turn([lambda k=k: whole(k) for k in POINTS], repeats, backend.device)
    rows = []
    for i, points in enumerate(POINTS):
        row = {
            "family": family,
            "batch": batch,
            "points": points,
            "depth": 2 * INTERVALS,
            "evaluations": (1 + points) * INTERVALS,
        }
        row |= {"level": ratio(levels[i], levels[0]), "trajectory": ratio(wholes[i], wholes[0])}
        rows.append(row | {"level_seconds": levels[i].median().item()})
    return rows


def summary(rows: list[dict]) -> str:
    """A line for each family and batch."""
    lines = []
    for name, size in dict.fromkeys((r["family"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["family"], r["batch"]) == (name, size)]
        line = [name, str(size), f"{1e3 * here[0]['level_seconds']:.1f}"]
        lines.append(line + [shown(r[what]) for what in ("level", "trajectory") for r in here[1:]])
    return text_table(HEADER, lines)


@click.command()
@measured_on
def main(networks: Networks, batch, repeats: int, device, out: Path | None) -> None:
    """Time levels and trajectories of 1 to 4 points on every family."""
    networks.check()
    rows: list[dict] = []

    def work(name: str, backend: Backend) -> list[dict]:
        return [row for size in batch for row in measure(backend, name, size, repeats)]

    with torch.inference_mode():
        for found in networks.each(work, device):
            rows += found
            write_json(
                result_path("points", networks.kind, out),
                networks.settings() | {"repeats": repeats},
                rows,
                device,
            )
    click.echo(summary(rows))


if __name__ == "__main__":
    run_command(main)
