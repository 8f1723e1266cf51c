"""Memory: of a trajectory against one network call, of sampling with --offload, of a training step: python -m benchmarks.memory.

On CUDA the peak is torch.cuda.max_memory_allocated; on the CPU it is the highest sum of all that torch.profiler records of
allocations and frees. Both are above what there was before the call, weights among it. A whole process is measured by its
resident memory, whose peak (VmHWM) is reset before sampling.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch.profiler import ProfilerActivity, profile

from backends import Backend, load_backend
from backends.distributed import Ranks
from generation import Output, Sampler, generate
from solvers import BASELINES, EPD, Solver, SolverTable, Spec, load_predictor, num_steps_for_depth, resolve_predictor_path
from solvers.errors import run_command
from training.distill.losses import checkpointed, rollout

from .compile import CAPTION, TABLES
from .full_size import save_folder
from .report import text_table, write_json

TABLEAU = "exps/digits-distilled/tableau2-g7.5-d4"
PARTS = ("trajectory", "offload", "training")


def peak_above(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at one time, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    now = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def solvers_of(family: str, backend: Backend) -> dict[str, tuple[Solver, torch.Tensor]]:
    """The learned tables of a family and two baselines of the same serial depth, with their nodes."""
    learned = {"epd": load_predictor(resolve_predictor_path(TABLES[family]))}
    if family == "ldm":
        learned["tableau"] = load_predictor(resolve_predictor_path(TABLEAU))
    found = {name: (predictor.solver(), predictor.sigmas) for name, predictor in learned.items()}
    for name in ("dpmpp", "unipc"):
        nodes = backend.sigmas(Spec(num_steps=num_steps_for_depth(BASELINES[name], 4)))
        found[name] = BASELINES[name], nodes
    return found


def trajectories(device: torch.device, batch: int) -> list[dict]:
    """A trajectory of each solver, and one network call of the same images."""
    rows = []
    for family, path in TABLES.items():
        spec = load_predictor(resolve_predictor_path(path)).spec
        backend = load_backend(spec, device, "float32")
        for name, (solver, nodes) in solvers_of(family, backend).items():
            sampler = Sampler(backend, solver, name, nodes, spec.guidance_rate)
            points = max(len(level) for level in sampler.cost.levels)
            velocity = backend.velocity(backend.encode([CAPTION] * batch, spec.guidance_rate))
            states = backend.start(range(points * batch), nodes[0])

            def one(velocity=velocity, states=states, sigma=nodes[0]) -> None:
                with torch.inference_mode():
                    velocity(states, sigma)

            def whole(sampler=sampler) -> None:
                sampler.latents([CAPTION] * batch, range(batch))

            one()
            whole()
            row = {"family": family, "solver": name, "points": points, "call": peak_above(one, device), "all": peak_above(whole, device)}
            rows.append(row | {"latents": batch * states[0].nbytes})
    return rows


def resident(name: str) -> int:
    """A number of /proc/self/status in bytes: VmRSS, or its peak VmHWM, which unlike ru_maxrss holds nothing of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def sampling(folder: Path, offload: bool, device_name: str) -> dict:
    """Load a pipeline and sample two prompts with it, in a process of its own: peaks of all of it, and of sampling alone."""
    device, cuda = torch.device(device_name), device_name.startswith("cuda")
    torch.set_num_threads(1)
    spec = Spec(backend="sd3", backend_config={"model_name_or_path": str(folder), "offload": offload}, num_steps=3)
    backend = load_backend(spec, device, "bfloat16")
    sampler = Sampler(backend, BASELINES["euler"], "euler", backend.sigmas(spec), 4.5)
    row = {"offload": offload, "loaded": resident("VmRSS"), "peak_loading": resident("VmHWM")}
    backend.encode_ahead([CAPTION, "a thin blue three"], 4.5)
    row["encoded"] = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with TemporaryDirectory() as out:
        generate(sampler, [CAPTION, "a thin blue three"], [0, 1], Output(Path(out), 1), Ranks(0, 1, device))
    row |= {"sampling": resident("VmRSS"), "peak_sampling": resident("VmHWM")}
    return row | ({"peak_device": torch.cuda.max_memory_allocated()} if cuda else {})


def offloaded(device: torch.device, layers: int, pixels: int) -> list[dict]:
    """Sampling with and without --offload on the full-size layout of Stable Diffusion 3 cut to a few layers."""
    with TemporaryDirectory() as tmp:
        save_folder("sd3", layers, pixels, Path(tmp))
        rows = []
        for offload in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                rows.append(process.submit(sampling, Path(tmp), offload, str(device)).result())
    return rows


def training(device: torch.device, pixels: int) -> list[dict]:
    """Forward and backward of one guided interval of a table with K = 2 on Stable Diffusion 1.5's U-Net, calls computed again.

    More intervals keep only their inputs besides.
    """
    with TemporaryDirectory() as tmp:
        save_folder("ldm", 1, pixels, Path(tmp))
        config = {"model_name_or_path": tmp, "resolution": pixels}
        backend = load_backend(Spec(backend="ldm", backend_config=config), device, "float32")
    nodes, rows = torch.tensor([5.0, 2.0], dtype=torch.float64), []
    x = backend.start([0], nodes[0])
    for parallel in (True, False):
        leaves = [torch.tensor([[0.4, 0.8]], dtype=torch.float64, requires_grad=True) for _ in range(2)]

        def step(leaves=leaves, parallel=parallel) -> None:
            velocity = checkpointed(backend.velocity(backend.encode([CAPTION], 7.5)))
            table = SolverTable(leaves[0], leaves[1] / leaves[1].sum())
            (last,) = rollout(EPD(table, parallel=parallel), nodes, velocity, x, detach=False)
            torch.autograd.grad(last.square().mean(), leaves)

        rows.append({"pixels": pixels, "parallel_points": parallel, "peak": peak_above(step, device)})
    return rows


def shown(part: str, rows: list[dict]) -> str:
    """The rows of a part as a table, in megabytes (10^6 bytes)."""
    if part == "trajectory":
        head = ["family", "solver", "points", "one call MB", "trajectory MB", "ratio", "beyond, in latents"]
        cells = [
            [
                *(r["family"], r["solver"], str(r["points"]), mega(r["call"]), mega(r["all"])),
                *(f"{r['all'] / r['call']:.3f}", f"{(r['all'] - r['call']) / r['latents']:.1f}"),
            ]
            for r in rows
        ]
        return text_table(head, cells, 2)
    head = list(rows[0])
    return text_table(head, [[str(v) if type(v) is bool or k == "pixels" else mega(v) for k, v in r.items()] for r in rows])


def mega(value: int) -> str:
    """Bytes in megabytes."""
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:.0f}"


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="What to measure.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Images of a trajectory.")
@click.option("--layers", type=click.IntRange(1), default=1, show_default=True, help="Of Stable Diffusion 3's transformer and encoders.")
@click.option("--pixels", type=click.IntRange(64), default=256, show_default=True, help="A side, of full-size networks.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/memory.json"), show_default=True)
def main(parts, batch, layers, pixels, device, out) -> None:
    """Measure each part, print it and write all of them."""
    place, rows = torch.device(device), []
    measures = {
        "trajectory": lambda: trajectories(place, batch),
        "offload": lambda: offloaded(place, layers, pixels),
        "training": lambda: training(place, pixels),
    }
    for part in parts.split(","):
        found = measures[part]()
        click.echo(f"{part}\n\n{shown(part, found)}\n")
        rows += [{"part": part} | row for row in found]
    write_json(out, {"parts": parts, "batch": batch, "layers": layers, "pixels": pixels}, rows, place)


if __name__ == "__main__":
    run_command(main)
