"""Memory: of a trajectory against one network call, of a training step, of sampling with --offload.

    python -m benchmarks.speed.memory [--full]

On CUDA a peak is torch.cuda.max_memory_allocated; on a CPU it is the highest sum of all allocations and frees
that torch.profiler records. Both are above what there was before the call, weights among it. A whole process
is measured by its resident memory, whose peak is reset before sampling.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import click
import torch
from torch.profiler import ProfilerActivity, profile

from backends import Backend, load_backend
from common.distributed import Ranks
from common.errors import run_command
from generation.generate import Output, Sampler, generate
from solvers import BASELINES, EPD, SolverTable, Spec, compile_tableau, sample
from training.distill.losses import checkpointed

from ..report import result_path, text_table, write_json
from .full_size import save_folder
from .networks import Networks, condition_of, device_option, free, on_networks, out_option
from .overhead import solvers_of
from .timing import spread

DEPTH = 6
PROCESSES = 5
CAPTIONS = ("a bold red handwritten seven", "a thin blue handwritten three")
HEADERS = {
    "trajectory": ["family", "solver", "batch", "points", "call MB", "trajectory MB", "trajectory / call"],
    "training": ["family", "batch", "calls computed again", "points in one call", "peak MB"],
    "offload": ["offload", "loaded MB", "peak until encoded MB", "sampling MB", "peak of sampling MB"],
}
OFFLOADED = {
    "whole process": ("peak_before", "peak_sampling"),
    "while sampling": ("peak_sampling",),
    "on the device": ("peak_device",),
}


def peak_above(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that a call has allocated at one time, above what was allocated before it; None where
    memory ends.
    """
    if device.type == "cuda":
        free(device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            call()
        except torch.OutOfMemoryError:
            return None
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says when each profile starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    now = most = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def trajectories(batch: int, family: str, backend: Backend) -> list[dict]:
    """A whole trajectory of each solver, and the largest of its network calls by itself."""
    rows, condition = [], condition_of(backend, family, batch)
    start = backend.initial_latents(list(range(batch)), backend.sigma_max)
    for name, (solver, nodes) in solvers_of(backend, DEPTH).items():
        points = max(len(level) for level in compile_tableau(solver, nodes).levels)
        velocity, states = backend.velocity(condition), start.repeat(points, 1, 1, 1)

        def one(velocity=velocity, states=states, sigma=nodes[0]) -> None:
            with torch.inference_mode():
                velocity(states, sigma)

        def whole(velocity=velocity, solver=solver, nodes=nodes) -> None:
            with torch.inference_mode():
                sample(solver, velocity, start, nodes)

        for call in (one, whole):  # repeated conditions and timesteps are cached from here on
            peak_above(call, backend.device)
        row = {"family": family, "solver": name, "batch": batch, "points": points}
        rows.append(
            row | {"call": peak_above(one, backend.device), "trajectory": peak_above(whole, backend.device)}
        )
    return rows


def training(batch: int, family: str, backend: Backend) -> list[dict]:
    """Forward and backward of an EPD trajectory, K = 2, with all activations kept and with network calls
    computed again.
    """
    rows, condition = [], condition_of(backend, family, batch)
    nodes = backend.sigmas(Spec(num_steps=DEPTH // 2 + 1))
    start = backend.initial_latents(list(range(batch)), nodes[0])
    for again, parallel in ((False, True), (True, True), (True, False)):
        r = SolverTable.uniform(DEPTH // 2, 2).r.requires_grad_()

        def step(r=r, again=again, parallel=parallel) -> None:
            velocity = backend.velocity(condition)
            state = sample(
                EPD(SolverTable(r, torch.full_like(r, 0.5)), parallel=parallel),
                checkpointed(velocity) if again else velocity,
                start,
                nodes,
            )
            torch.autograd.grad(state.square().mean(), r)

        row = {"family": family, "batch": batch, "again": again, "parallel_points": parallel}
        rows.append(row | {"peak": peak_above(step, backend.device)})
    return rows


def resident(name: str) -> int:
    """A number of /proc/self/status in bytes: VmRSS, or its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def sampling(folder: Path, offload: bool, device_name: str) -> dict:
    """Load a pipeline and sample two prompts with it, in a process of its own: its memory then, and the
    peaks.
    """
    torch.set_num_threads(1)
    device = torch.device(device_name)
    spec = Spec(
        backend="sd3", backend_config={"model_name_or_path": str(folder), "offload": offload}, num_steps=3
    )
    backend = load_backend(spec, device, "bfloat16")
    sampler = Sampler(backend, BASELINES["euler"], "euler", backend.sigmas(spec), 4.5)
    row = {"offload": offload, "loaded": resident("VmRSS")}
    backend.precompute_embeddings(CAPTIONS, 4.5)
    row["peak_before"] = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with TemporaryDirectory() as out:
        generate(sampler, CAPTIONS, [0, 1], Output(Path(out), 1), Ranks(0, 1, device))
    row |= {"sampling": resident("VmRSS"), "peak_sampling": resident("VmHWM")}
    return row | ({"peak_device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})


def offloaded(device: torch.device, layers: int | None, pixels: int) -> list[dict]:
    """Sampling with and without --offload on the full-size layout of Stable Diffusion 3: medians of fresh
    processes.

    How much is held for a moment while a pipeline loads is not the same each time.
    """
    rows: dict[bool, list[dict]] = {False: [], True: []}
    with TemporaryDirectory() as tmp:
        save_folder("sd3", layers, pixels, Path(tmp))
        for offload in [False, True] * PROCESSES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows[offload].append(process.submit(sampling, Path(tmp), offload, str(device)).result())
    return [{k: median(row[k] for row in group) for k in group[0]} for group in rows.values()]


def cells(part: str, row: dict) -> list[str]:
    """A row of a part's table, in megabytes (10^6 bytes)."""
    if part == "trajectory":
        over = f"{row['trajectory'] / row['call']:.3f}" if row["call"] and row["trajectory"] else ""
        columns = [row["family"], row["solver"], str(row["batch"]), str(row["points"])]
        return [*columns, megabytes(row["call"]), megabytes(row["trajectory"]), over]
    if part == "training":
        return [
            row["family"],
            *(str(row[k]) for k in ("batch", "again", "parallel_points")),
            megabytes(row["peak"]),
        ]
    return [
        str(row["offload"]),
        *(megabytes(row[k]) for k in ("loaded", "peak_before", "sampling", "peak_sampling")),
    ]


def megabytes(count: int | None) -> str:
    """A number of bytes, or that there were not enough."""
    return "out of memory" if count is None else f"{count / 1e6:.{2 if count < 1e8 else 0}f}"


def summary(rows: list[dict]) -> str:
    """What the parts say in ratios: trajectory over call, computed again over all activations, with over
    without --offload.
    """
    lines, parts = [], {name: [r for r in rows if r["part"] == name] for name in HEADERS}
    if ratios := [r["trajectory"] / r["call"] for r in parts["trajectory"] if r["trajectory"] and r["call"]]:
        lines.append(f"trajectory / its largest network call: {spread(ratios)}")
    kept, again, apart = (parts["training"][i::3] for i in range(3))
    for name, others in {
        "calls computed again": again,
        "calls computed again, point by point": apart,
    }.items():
        if ratios := [
            b["peak"] / a["peak"] for a, b in zip(kept, others, strict=True) if a["peak"] and b["peak"]
        ]:
            lines.append(f"{name} / all activations kept: {spread(ratios)}")
    if parts["offload"]:
        without, freed = parts["offload"]
        for name, keys in OFFLOADED.items():
            if keys[0] in without:
                peaks = [max(row[k] for k in keys) / 1e6 for row in (freed, without)]
                lines.append(
                    f"--offload / without, peak {name}: {peaks[0] / peaks[1]:.2f} ({peaks[0]:.0f} /"
                    f" {peaks[1]:.0f} MB)"
                )
    return "\n".join(lines)


@click.command()
@on_networks
@click.option(
    "--part", type=click.Choice(list(HEADERS)), multiple=True, default=list(HEADERS), show_default=True
)
@click.option("--batch", type=click.IntRange(1, 4), default=4, show_default=True)
@device_option
@out_option
def main(networks: Networks, part, batch: int, device, out: Path | None) -> None:
    """Measure each part, print it and write all of them.

    The offload part always has full-size networks, of which --layers cuts the text encoders too: on a CPU to
    1, and to 256 pixels, unless the options name others.
    """
    if set(part) != {"offload"}:
        networks.check()
    rows: dict[str, list[dict]] = {name: [] for name in part}

    def write() -> list[dict]:
        every = [{"part": n} | r for n in rows for r in rows[n]]
        write_json(
            result_path("memory", networks.kind, out), networks.settings() | {"batch": batch}, every, device
        )
        return every

    for name, measured in (("trajectory", trajectories), ("training", training)):
        if name in part:
            for of_family in networks.each(partial(measured, batch), device):
                rows[name] += of_family
                write()
    if "offload" in part:
        layers, pixels = (1, 256) if device.type == "cpu" else (None, 1024)
        rows["offload"] = offloaded(device, networks.layers or layers, networks.resolution or pixels)
    for name, part_rows in rows.items():
        click.echo(
            text_table(
                HEADERS[name],
                [cells(name, r) for r in part_rows],
                text_columns=2 if name == "trajectory" else 1,
            )
            + "\n"
        )
    click.echo(summary(write()))


if __name__ == "__main__":
    run_command(main)
