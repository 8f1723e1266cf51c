"""Compiled against eager networks: seconds a trajectory, compilations, and how far latents differ: python -m benchmarks.compile."""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
import torch._inductor.config

from backends import load_backend
from backends.compiled import compilations
from generation import Sampler
from solvers import Predictor, Spec, load_predictor, resolve_predictor_path
from solvers.errors import run_command

from .full_size import save_folder
from .report import text_table, write_json

TABLES = {
    "ldm": "exps/digits-distilled/epd-g7.5-d4",
    "sd3": "exps/digits-sd3-distilled/epd-g4.5-d4",
    "flux": "exps/digits-flux-distilled/epd-g3.5-d4",
}
CAPTION = "a bold red handwritten seven"


def table_of(family: str) -> Predictor:
    """The learned table that a family's networks are timed with."""
    return load_predictor(resolve_predictor_path(TABLES[family]))


def sampler_of(family: str, folder: Path | None, device: str, dtype: str, switches: dict) -> Sampler:
    """The family's digits table on the digits, or on the network in a folder."""
    predictor = table_of(family)
    spec = predictor.spec
    if folder is not None:
        spec = Spec(backend=family, backend_config={"model_name_or_path": str(folder)}, num_steps=spec.num_steps)
    backend = load_backend(Spec(backend=spec.backend, backend_config=spec.backend_config | switches), device, dtype)
    nodes = predictor.sigmas if folder is None else backend.sigmas(spec)
    return Sampler(backend, predictor.solver(), "epd", nodes, predictor.spec.guidance_rate)


def timed(sampler: Sampler, batch: int, first: int) -> tuple[float, torch.Tensor]:
    """Seconds of a trajectory of seeds first, first + 1, ... and its latents on the CPU."""
    begun = time.perf_counter()
    latents = sampler.latents([CAPTION] * batch, range(first, first + batch)).cpu()
    return time.perf_counter() - begun, latents


def measure(eager: Sampler, fast: Sampler, batch: int, repeats: int) -> dict:
    """Interleaved trajectories, the first of which compiles."""
    timed(eager, batch, 0)
    before = compilations()
    first, _ = timed(fast, batch, 0)
    compiled = compilations()
    seconds, furthest = {"eager": [], "compiled": []}, 0.0
    for repeat in range(repeats):
        slow, expected = timed(eager, batch, repeat * batch)
        quick, found = timed(fast, batch, repeat * batch)
        seconds["eager"].append(slow)
        seconds["compiled"].append(quick)
        furthest = max(furthest, (found - expected).abs().max().item())
    slow, quick = (statistics.median(values) for values in seconds.values())
    ratios = [q / s for s, q in zip(*seconds.values(), strict=True)]
    counts = {"compilations": compiled - before, "recompilations": compilations() - compiled, "seconds_to_compile": first - quick}
    return counts | {"eager": slow, "compiled": quick, "ratio": statistics.median(ratios), "difference": furthest}


@click.command()
@click.option("--families", default="ldm,sd3,flux", show_default=True)
@click.option("--full", is_flag=True, help="The full-size networks with random weights instead of the digits'; needs a GPU.")
@click.option("--layers", type=click.IntRange(1), help="With --full: layers of the transformers; all by default.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", help="Of the network; float32 for the digits by default, else float16 (FLUX: bfloat16).")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/compile.json"), show_default=True)
def main(families, full, layers, batch, repeats, device, dtype, out) -> None:
    """Time a family's learned table on its network, eager and compiled in turns."""
    rows = []
    torch._inductor.config.force_disable_caches = True  # seconds to compile are those of a machine that never did
    for family in families.split(","):
        number_type = dtype or ("auto" if full else "float32")
        with TemporaryDirectory() as tmp:
            folder = Path(tmp) if full else None
            if full:
                save_folder(family, layers, 512 if family == "ldm" else 1024, folder)
            samplers = [sampler_of(family, folder, device, number_type, switches) for switches in ({}, {"compile": True})]
        torch._dynamo.reset()
        rows.append({"family": family, "network": "full size" if full else "digits"} | measure(*samplers, batch, repeats))
        del samplers
    click.echo(text_table(*shown(rows)))
    write_json(out, {"batch": batch, "repeats": repeats, "full": full, "layers": layers, "dtype": dtype}, rows, torch.device(device))


def shown(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The rows as a table."""
    head = ["family", "network", "eager s", "compiled s", "ratio", "compilations", "recompilations", "s to compile", "largest difference"]
    cells = [
        [
            *(r["family"], r["network"], f"{r['eager']:.4f}", f"{r['compiled']:.4f}", f"{r['ratio']:.2f}"),
            *(str(r["compilations"]), str(r["recompilations"]), f"{r['seconds_to_compile']:.1f}", f"{r['difference']:.1e}"),
        ]
        for r in rows
    ]
    return head, cells


if __name__ == "__main__":
    run_command(main)
