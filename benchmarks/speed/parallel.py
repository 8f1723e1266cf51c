"""EPD's points, and the halves of guidance, over processes against one.

    python -m benchmarks.speed.parallel [--processes 2]

Starts itself under torchrun and, in the same processes and run, times an EPD trajectory by one process alone
and shared out. The levels of an interval are timed one by one: the gradient at the node, the K points, and
the all-gather among them. "crowding" is what a trajectory takes while every process runs one of its own, over
one alone: above 1 where they share cores or memory, so that no more than ideal / crowding can be had.
"""

import os
import subprocess
import sys
from pathlib import Path

import click
import torch
from torch import Tensor

from backends import Backend
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks, process_group
from common.errors import run_command
from solvers import EPD, SolverTable, Spec, UserError, sample

from ..report import result_path, text_table, write_json
from .networks import Networks, condition_of, device_option, on_networks, out_option
from .timing import in_turn, ratio, seconds, shown

INTERVALS = 3
HEADER = [
    "family",
    "mode",
    "K",
    "processes",
    "batch",
    "alone / shared out",
    "ideal",
    "crowding",
    "level 1 ms",
    "level 2 ms",
    "all-gather ms",
    "share %",
]


class Timed(ParallelEvaluator):
    """Points over ranks that note how long each level, and the all-gather in it, takes."""

    def velocity(self, backend: Backend, condition):
        whole = super().velocity(backend, condition)
        self.levels: list[tuple[int, float, float]] = []

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            self.gathered, found = 0.0, []
            spent = seconds(lambda: found.append(whole(x, sigma)), x.device)
            self.levels.append((len(x) // len(condition), spent, self.gathered))
            return found[0]

        return velocity

    def gather(self, mine: Tensor) -> Tensor:
        found: list[Tensor] = []
        self.ranks.barrier()  # what remains is communication, not waiting for a slower rank
        self.gathered = seconds(lambda: found.append(super(Timed, self).gather(mine)), mine.device)
        return found[0]


def ideal(points: int, branches: int, world: int) -> float:
    """Rows one after the other alone, over those of the busiest rank: (1 + K) / 2 for K points on K ranks."""
    busiest = -(-branches // world) + -(-branches * points // world)
    return (1 + points) * branches / busiest


def measure(
    backend: Backend, family: str, points: int, mode: str, batch: int, repeats: int, ranks: Ranks
) -> dict:
    """One row: the same trajectory by each process alone, and by all together."""
    condition = condition_of(backend, family, batch)
    split = mode == "points-cfg" and len(condition.branches()) == 2
    start, nodes = (
        backend.initial_latents(list(range(batch)), backend.sigma_max),
        backend.sigmas(Spec(num_steps=INTERVALS + 1)),
    )
    solver = EPD(SolverTable.uniform(INTERVALS, points))

    def alone() -> None:
        if ranks.rank == 0:  # the others wait, so that it has the machine to itself
            sample(solver, backend.velocity(condition), start, nodes)

    def together() -> Tensor:
        return sample(solver, ParallelEvaluator(ranks, split).velocity(backend, condition), start, nodes)

    def crowded() -> Tensor:
        return sample(solver, backend.velocity(condition), start, nodes)

    times = in_turn([alone, together, crowded], repeats, backend.device, before=ranks.barrier)
    timed = Timed(ranks, split)
    levels: list[tuple[int, float, float]] = []
    for _ in range(repeats):
        sample(solver, timed.velocity(backend, condition), start, nodes)
        levels += timed.levels

    def median(at: int, column: int) -> float:
        """Of the first (0) or second (1) level of the intervals."""
        return torch.tensor([level[column] for level in levels[at::2]]).median().item()

    gathered = sum(median(at, 2) for at in (0, 1))
    row = {
        "family": family,
        "mode": mode,
        "points": points,
        "processes": ranks.world,
        "batch": batch,
        "repeats": repeats,
    }
    row |= ratio(times[0], times[1]) | {"ideal": ideal(points, 2 if split else 1, ranks.world)}
    row |= {"crowding": (times[2] / times[0]).median().item()}
    row |= {"level1_seconds": median(0, 1), "level2_seconds": median(1, 1), "gather_seconds": gathered}
    return row | {"gather_share": gathered / (median(0, 1) + median(1, 1))}


def cells(row: dict) -> list[str]:
    """A row of the printed table."""
    numbers = [1e3 * row[k] for k in ("level1_seconds", "level2_seconds", "gather_seconds")] + [
        100 * row["gather_share"]
    ]
    texts = [
        row["family"],
        row["mode"],
        *map(str, (row["points"], row["processes"], row["batch"])),
        shown(row),
        f"{row['ideal']:.2f}",
        f"{row['crowding']:.2f}",
    ]
    return texts + [f"{n:.2f}" for n in numbers]


def summary(rows: list[dict]) -> str:
    """A line for each family, mode and batch, with all K beside each other."""
    lines, points = [], sorted({r["points"] for r in rows})
    for case in dict.fromkeys((r["family"], r["mode"], r["batch"]) for r in rows):
        here = [r for r in rows if (r["family"], r["mode"], r["batch"]) == case]
        measured = [text for r in here for text in (shown(r), f"{r['ideal']:.2f}")]
        shares = [100 * r["gather_share"] for r in here]
        lines.append([case[0], case[1], str(case[2]), *measured, f"{min(shares):.1f} to {max(shares):.1f}"])
    columns = [text for k in points for text in (f"alone / shared out, K = {k}", "ideal")]
    return text_table(["family", "mode", "batch", *columns, "all-gather %"], lines, text_columns=2)


@click.command()
@click.option("--processes", type=click.IntRange(2), default=2, show_default=True)
@click.option(
    "--points", type=click.IntRange(1, 4), multiple=True, default=[2, 4], show_default=True, help="K."
)
@on_networks
@click.option("--batch", type=click.IntRange(1, 4), multiple=True, default=[1, 4], show_default=True)
@click.option("--repeats", type=click.IntRange(3), default=11, show_default=True)
@device_option
@out_option
def main(processes: int, points, networks: Networks, batch, repeats: int, device, out: Path | None) -> None:
    """Time EPD trajectories shared out over processes; on a CPU each process has one thread."""
    networks.check()
    if device.type == "cuda" and torch.cuda.device_count() < processes:
        raise UserError(f"--processes {processes}: this machine has {torch.cuda.device_count()} GPUs")
    if "RANK" not in os.environ:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "-m",
            "benchmarks.speed.parallel",
        ]
        sys.exit(
            subprocess.run([*launch, *sys.argv[1:]], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        )
    rows: list[dict] = []
    with process_group(str(device)) as ranks, torch.inference_mode():

        def work(name: str, backend: Backend) -> list[dict]:
            modes = ("points", "points-cfg") if backend.cfg_doubles_rows else ("points",)
            return [
                measure(backend, name, k, mode, size, repeats, ranks)
                for size in batch
                for k in points
                for mode in modes
            ]

        for found in networks.each(work, ranks.device):
            rows += found
        if ranks.rank == 0:
            click.echo(f"{text_table(HEADER, [cells(r) for r in rows], text_columns=2)}\n\n{summary(rows)}")
            settings = networks.settings() | {"processes": processes, "cores": os.cpu_count()}
            write_json(result_path("parallel", networks.kind, out), settings, rows, ranks.device)


if __name__ == "__main__":
    run_command(main)
