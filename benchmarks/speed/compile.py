"""Compiled against eager networks: time, compilations, difference of the latents.

python -m benchmarks.speed.compile [--full]
"""

from pathlib import Path

import click
import torch
import torch._inductor.config
from torch import Tensor

from backends import Backend, load_backend
from backends.compiled import compilations, compile_blocks
from common.errors import run_command
from solvers import EPD, SolverTable, Spec, sample

from ..report import result_path, text_table, write_json
from .networks import Case, Networks, condition_of, device_option, free, network_of, on_networks, out_option
from .timing import in_turn, ratio, seconds, shown

INTERVALS = 2
HEADER = [
    "family",
    "batch",
    "compiled / eager",
    "eager ms",
    "compilations",
    "recompilations",
    "s to compile",
    "largest difference",
]


def pair(family: str, networks: Networks, device: torch.device) -> tuple[Backend, Backend]:
    """The same backbone twice, eager and compiled."""
    if not networks.full:
        config = {"family": family, "compile": True}
        return networks.make(family, device), load_backend(
            Spec(backend="digits", backend_config=config), device
        )
    twins = []
    for _ in range(2):
        torch.manual_seed(0)
        twins.append(networks.make(family, device))
    compile_blocks(network_of(twins[1], family))
    return twins[0], twins[1]


def trajectory(case: Case) -> Tensor:
    """An EPD trajectory with K = 2."""
    backend = case.backend
    nodes = backend.sigmas(Spec(num_steps=INTERVALS + 1))
    velocity = backend.velocity(condition_of(backend, case.family, case.batch))
    start = backend.initial_latents(list(range(case.batch)), nodes[0])
    return sample(EPD(SolverTable.uniform(INTERVALS, 2)), velocity, start, nodes)


def measure(eager: Case, compiled: Case, repeats: int) -> dict:
    """One row: the first trajectory compiles, those after it should not."""
    device, before = compiled.backend.device, compilations()
    first = seconds(lambda: trajectory(compiled), device)
    after_first = compilations()
    difference = (trajectory(compiled) - trajectory(eager)).abs().max().item()
    fast, slow = in_turn([lambda: trajectory(compiled), lambda: trajectory(eager)], repeats, device)
    return {
        "family": eager.family,
        "batch": eager.batch,
        "compilations": after_first - before,
        "recompilations": compilations() - after_first,
        "seconds_to_compile": first - fast.median().item(),
        "eager_seconds": slow.median().item(),
        "difference": difference,
        **ratio(fast, slow),
    }


def cells(row: dict) -> list[str]:
    """A row of the printed table."""
    counts = [
        str(row["compilations"]),
        str(row["recompilations"]),
        f"{row['seconds_to_compile']:.0f}",
        f"{row['difference']:.1e}",
    ]
    return [row["family"], str(row["batch"]), shown(row), f"{1e3 * row['eager_seconds']:.1f}", *counts]


def summary(rows: list[dict]) -> str:
    """A line for each family."""
    return text_table(HEADER, [cells(r) for r in rows])


@click.command()
@on_networks
@click.option("--batch", type=click.IntRange(1, 4), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(3), default=15, show_default=True)
@device_option
@out_option
def main(networks: Networks, batch: int, repeats: int, device, out: Path | None) -> None:
    """Time an EPD trajectory with each family's network, eager and compiled in turns."""
    networks.check()
    rows = []
    # seconds to compile are those of a machine that never did
    torch._inductor.config.force_disable_caches = True
    with torch.inference_mode():
        for name in networks.families:
            torch._dynamo.reset()
            eager, compiled = (Case(backend, name, batch) for backend in pair(name, networks, device))
            rows.append(measure(eager, compiled, repeats))
            del eager, compiled
            free(device)
            write_json(
                result_path("compile", networks.kind, out),
                networks.settings() | {"repeats": repeats},
                rows,
                device,
            )
    click.echo(summary(rows))


if __name__ == "__main__":
    run_command(main)
