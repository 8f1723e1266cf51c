"""EPD's points, and the branches of CFG, over processes against one.

    python -m benchmarks.speed.parallel [--processes 2]

Starts itself under torchrun and, in the same processes and run, times an EPD trajectory by one process alone
and shared out. The levels of an interval are timed one by one: the velocity at the node, the K points, and
the all-gather among them. "crowding" is what a trajectory takes while every process runs one of its own, over
one alone: above 1 where they share cores or memory, so that no more than ideal / crowding can be had.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor

from backends import Backend, Condition
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks, process_group
from common.errors import run_command
from solvers import EPD, SolverTable, Spec, UserError, sample
from solvers.solver import Velocity

from ..report import result_path, text_table, write_json
from .networks import Case, Networks, condition_of, device_option, on_networks, out_option
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


@dataclass(frozen=True)
class TimedRanks(Ranks):
    """Ranks that note the seconds of each all-gather, without the wait for a slower rank."""

    spent: list[float] = field(default_factory=list)

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape, in the order of the ranks."""
        parts: list[Tensor] = []
        self.barrier()
        self.spent.append(seconds(lambda: parts.extend(Ranks.all_gather(self, rows)), rows.device))
        return parts


@dataclass(frozen=True)
class Level:
    """One level of a trajectory: its points, and the seconds of all of it and of its all-gather."""

    points: int
    seconds: float
    gather_seconds: float


def ideal(points: int, branches: int, world: int) -> float:
    """Rows one after the other alone, over those of the busiest rank: (1 + K) / 2 for K points on K ranks."""
    busiest = -(-branches // world) + -(-branches * points // world)
    return (1 + points) * branches / busiest


@dataclass(frozen=True)
class Jobs:
    """What is timed: the same trajectory by rank 0 alone, by all ranks together, and by each at once."""

    case: Case
    points: int
    mode: str
    ranks: Ranks

    @cached_property
    def condition(self) -> Condition:
        return condition_of(self.case.backend, self.case.family, self.case.batch)

    @property
    def branches(self) -> bool:
        """Whether the branches of CFG are divided among the ranks as well."""
        return self.mode == "points-cfg" and len(self.condition.branches()) == 2

    @cached_property
    def start(self) -> Tensor:
        return self.case.backend.initial_latents(list(range(self.case.batch)), self.case.backend.sigma_max)

    @cached_property
    def nodes(self) -> Tensor:
        return self.case.backend.sigmas(Spec(num_steps=INTERVALS + 1))

    def run(self, velocity: Velocity) -> Tensor:
        """An EPD trajectory on the backbone's own schedule."""
        return sample(EPD(SolverTable.uniform(INTERVALS, self.points)), velocity, self.start, self.nodes)

    def crowded(self) -> Tensor:
        """A trajectory of its own on every rank."""
        return self.run(self.case.backend.velocity(self.condition))

    def alone(self) -> None:
        """A trajectory of rank 0; the others wait, so that it has the machine to itself."""
        if self.ranks.rank == 0:
            self.crowded()

    def together(self) -> Tensor:
        """One trajectory, its points divided among the ranks."""
        return self.run(self.divided(self.ranks))

    def divided(self, ranks: Ranks) -> Velocity:
        return ParallelEvaluator(ranks, self.branches).velocity(self.case.backend, self.condition)

    def levels(self) -> list[Level]:
        """The levels of one trajectory of all ranks together, timed one by one."""
        ranks, levels = TimedRanks(self.ranks.rank, self.ranks.world, self.ranks.device), list[Level]()
        whole = self.divided(ranks)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            ranks.spent.clear()
            outputs: list[Tensor] = []
            spent = seconds(lambda: outputs.append(whole(x, sigma)), x.device)
            levels.append(Level(len(x) // self.case.batch, spent, sum(ranks.spent)))
            return outputs[0]

        self.run(velocity)
        return levels


def measure(jobs: Jobs, repeats: int) -> dict:
    """One row: the times of the jobs, and of the levels of the divided trajectory."""
    case, ranks = jobs.case, jobs.ranks
    order = [jobs.alone, jobs.together, jobs.crowded]
    alone, together, crowded = in_turn(order, repeats, case.backend.device, before=ranks.barrier)
    levels = [level for _ in range(repeats) for level in jobs.levels()]
    first, second = levels[::2], levels[1::2]  # of an interval
    level_seconds = [median(level.seconds for level in group) for group in (first, second)]
    gather_seconds = sum(median(level.gather_seconds for level in group) for group in (first, second))
    return {
        "family": case.family,
        "mode": jobs.mode,
        "points": jobs.points,
        "processes": ranks.world,
        "batch": case.batch,
        "repeats": repeats,
        **ratio(alone, together),
        "ideal": ideal(jobs.points, 2 if jobs.branches else 1, ranks.world),
        "crowding": (crowded / alone).median().item(),
        "level1_seconds": level_seconds[0],
        "level2_seconds": level_seconds[1],
        "gather_seconds": gather_seconds,
        "gather_share": gather_seconds / sum(level_seconds),
    }


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
                measure(Jobs(Case(backend, name, size), k, mode, ranks), repeats)
                for size in batch
                for k in points
                for mode in modes
            ]

        for of_family in networks.each(work, ranks.device):
            rows += of_family
        if ranks.rank == 0:
            click.echo(f"{text_table(HEADER, [cells(r) for r in rows], text_columns=2)}\n\n{summary(rows)}")
            settings = networks.settings() | {"processes": processes, "cores": os.cpu_count()}
            write_json(result_path("parallel", networks.kind, out), settings, rows, ranks.device)


if __name__ == "__main__":
    run_command(main)
