"""What a solver costs beside its network calls.

    python -m benchmarks.speed.overhead [--full]

The time of a whole trajectory over that of the very same network calls made again with their recorded
arguments, and over the time that it spends itself inside those calls: the latter is of one run, so that a
noisy machine does not hide a small cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from backends import Backend
from common.errors import run_command
from solvers import EPD, Solver, SolverTable, Spec, Tableau, UserError, baseline_of, compile_tableau, sample

from ..report import result_path, text_table, write_json
from .networks import Case, Networks, condition_of, measured_on
from .timing import CallTimer, in_turn, ratio, shown

DEPTH = 6
HEADER = [
    "family",
    "solver",
    "batch",
    "depth",
    "NFE",
    "network calls",
    "whole / bare",
    "whole / inside",
    "ms a trajectory",
]


def solvers_of(backend: Backend, depth: int) -> dict[str, tuple[Solver, Tensor]]:
    """Solvers of one serial depth on the backbone's own schedule."""
    nodes = {n: backend.sigmas(Spec(num_steps=n)) for n in (depth // 2 + 1, depth + 1)}
    table = SolverTable.uniform(depth // 2, 2)
    solvers = {
        name: (baseline_of(name, backend.flow), nodes[depth + 1])
        for name in ("euler", "ipndm", "dpmpp", "unipc")
    }
    solvers |= {
        "epd": (EPD(table), nodes[depth // 2 + 1]),
        "epd-plugin": (EPD(table, max_order=2), nodes[depth // 2 + 1]),
    }
    return solvers | {"tableau": (dense_tableau(nodes[depth + 1]), nodes[depth + 1])}


def dense_tableau(nodes: Tensor, points: int = 2) -> Tableau:
    """A tableau with some stages in each level and no zero: the most work beside the network that a learned
    one can have.
    """
    sigmas = nodes[:-1].repeat_interleave(points)
    known = torch.arange(len(sigmas)) // points * points  # velocities of earlier levels
    before = torch.arange(len(sigmas)) < known[:, None]
    stages = torch.cat([torch.ones(len(sigmas), 1), -0.01 * before], 1).double()
    levels = tuple(tuple(range(i, i + points)) for i in range(0, len(sigmas), points))
    return Tableau(sigmas, stages, torch.tensor([1.0, *[-0.01] * len(sigmas)], dtype=torch.float64), levels)


def recorded_calls(network: nn.Module, work: Callable[[], object]) -> list[tuple[tuple, dict]]:
    """The arguments of the network's calls while some work is done, but for calls that fail."""
    calls: list[tuple[tuple, dict]] = []
    hook = network.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs)), with_kwargs=True
    )
    work()
    hook.remove()
    return calls


@dataclass(frozen=True)
class Jobs:
    """What is timed of one solver: its whole trajectory, and its network calls made again without it."""

    whole: Callable[[], Tensor]
    calls: list[tuple[tuple, dict]]
    network: nn.Module

    @classmethod
    def make(cls, case: Case, solver: Solver, nodes: Tensor) -> "Jobs":
        """The trajectory of a solver, run once to record its calls."""
        condition, network = condition_of(case.backend, case.family, case.batch), case.network
        start = case.backend.initial_latents(list(range(case.batch)), case.backend.sigma_max)

        def whole() -> Tensor:
            return sample(solver, case.backend.velocity(condition), start, nodes)

        return cls(whole, recorded_calls(network, whole), network)

    def bare(self) -> None:
        """The recorded network calls, and nothing else."""
        for args, kwargs in self.calls:
            self.network(*args, **kwargs)


def measure(case: Case, depth: int, repeats: int) -> list[dict]:
    """One row a solver."""
    rows = []
    for name, (solver, nodes) in solvers_of(case.backend, depth).items():
        cost, jobs = compile_tableau(solver, nodes), Jobs.make(case, solver, nodes)
        watched = CallTimer(jobs.whole, jobs.network, case.backend.device)
        whole, bare = in_turn([watched, jobs.bare], repeats, case.backend.device)
        row = {
            "family": case.family,
            "solver": name,
            "batch": case.batch,
            "depth": cost.depth,
            "evaluations": cost.evaluations,
            "calls": len(jobs.calls),
            "seconds": whole.median().item(),
            **ratio(whole, bare),
            "inside": ratio(whole, watched.inside()[-repeats:]),  # without the untimed round
        }
        rows.append(row)
    return rows


def summary(rows: list[dict]) -> str:
    """The least, middle and largest of all rows."""

    def line(name: str, values: list[float]) -> str:
        ratios = torch.tensor(values)
        return (
            f"{name}, all {len(rows)} rows: median {ratios.quantile(0.5):.3f}, from {ratios.min():.3f} to"
            f" {ratios.max():.3f}"
        )

    return "\n".join(
        [
            line("whole / bare", [r["ratio"] for r in rows]),
            line("whole / inside", [r["inside"]["ratio"] for r in rows]),
        ]
    )


@click.command()
@measured_on
@click.option("--depth", type=click.IntRange(2), default=DEPTH, show_default=True, help="Serial depth, even.")
def main(networks: Networks, batch, depth: int, repeats: int, device, out: Path | None) -> None:
    """Time every solver on every family, beside its bare network calls."""
    networks.check()
    if depth % 2:
        raise UserError(f"--depth {depth}: expected an even number, which all solvers here can have")
    rows: list[dict] = []

    def work(name: str, backend: Backend) -> list[dict]:
        return [row for size in batch for row in measure(Case(backend, name, size), depth, repeats)]

    with torch.inference_mode():
        for of_family in networks.each(work, device):
            rows += of_family
            write_json(
                result_path("overhead", networks.kind, out),
                networks.settings() | {"repeats": repeats},
                rows,
                device,
            )
    columns = ("family", "solver", "batch", "depth", "evaluations", "calls")
    lines = [
        [*(str(r[k]) for k in columns), shown(r), shown(r["inside"]), f"{1e3 * r['seconds']:.1f}"]
        for r in rows
    ]
    click.echo(f"{text_table(HEADER, lines, text_columns=2)}\n\n{summary(rows)}")


if __name__ == "__main__":
    run_command(main)
