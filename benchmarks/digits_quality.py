"""How good the embedded digits backbone is with a fine solver: python -m benchmarks.digits_quality."""

from pathlib import Path

import click
import torch
from torch import Tensor

from backends import Backend, load_backend
from common.errors import run_command
from digits import FOLDERS
from digits.data import (
    ALL_LABELS,
    HELD_OUT_LABELS,
    Label,
    enlarge,
    evaluation_prompts,
    load_scans,
    paint,
    parse,
)
from digits.drawings import held_out_drawings
from digits.judge import Judge
from solvers import Spec

from .bench import run, teacher_sampler
from .report import mean_and_halfwidth, text_table, write_json

FIRST_SEED = 500_000
GUIDANCES = {"ldm": (1.0, 3.0, 7.5), "sd3": (1.0, 3.0, 4.5), "flux": (1.0, 3.5, 7.0)}


def nearest_distances(images: Tensor, labels: list[Label], scans: Tensor) -> Tensor:
    """RMS pixel distance of each image [n] to the nearest scan, painted in the image's own colour and
    weight.
    """
    found = torch.empty(len(images))
    for key in {(c.colour, c.weight) for c in labels}:
        mine = [i for i, c in enumerate(labels) if (c.colour, c.weight) == key]
        colour, weight = (torch.full((len(scans),), k) for k in key)
        painted = paint(scans, colour, weight).flatten(1)
        found[mine] = torch.cdist(images[mine].flatten(1), painted).min(1).values / painted.shape[1] ** 0.5
    return found


def memorisation(images: Tensor, labels: list[Label]) -> dict[str, float]:
    """Median distance to the nearest training scan, of samples and of held-out scans, and each one's lowest
    percent.
    """
    train, test = enlarge(load_scans("train")[0]), load_scans("test")
    pick = torch.arange(len(labels)) % len(test[0])
    colour, weight = (torch.tensor([vars(c)[k] for c in labels]) for k in ("colour", "weight"))
    held_out = paint(enlarge(test[0])[pick], colour, weight)
    samples, control = nearest_distances(images, labels, train), nearest_distances(held_out, labels, train)
    return {
        "samples_median": samples.median().item(),
        "samples_lowest_percent": samples.quantile(0.01).item(),
        "held_out_scans_median": control.median().item(),
        "held_out_scans_lowest_percent": control.quantile(0.01).item(),
    }


def size_of(backend: Backend, family: str) -> dict[str, int]:
    """Parameters of the networks that sampling runs and bytes of the pipeline's folder."""
    return {
        "parameters": sum(
            p.numel()
            for network in (*backend.networks().values(), backend.pipe.vae)
            for p in network.parameters()
        ),
        "bytes": sum(f.stat().st_size for f in FOLDERS[family].rglob("*") if f.is_file()),
    }


def judge_row(judge: Judge) -> dict[str, float]:
    """The judge's own accuracy on held-out scans, every drawing of each."""
    images, labels = held_out_drawings()
    verdict = judge(images, labels)
    return {k: vars(verdict)[k].double().mean().item() for k in ("digit", "colour", "weight")}


def quality(
    guidance: float, prompts: list[str], judge: Judge, backend, intervals: int
) -> tuple[dict, Tensor, list[Label]]:
    """Accuracy of samples at one guidance scale, and their Frechet distance where the prompts cover most
    combinations.
    """
    schedule = "flowmatch" if backend.noise_schedule is None else "discrete"
    sampler = teacher_sampler(backend, guidance, intervals, schedule)
    _, images, _ = run(sampler, prompts, list(range(FIRST_SEED, FIRST_SEED + len(prompts))), 128)
    labels = [parse(p) for p in prompts]
    verdict = judge(images, labels)
    row = {
        "guidance": guidance,
        "n": len(prompts),
        "evaluations": sampler.cost.evaluations,
        "frechet_percent": judge.frechet(verdict.features) if len(set(labels)) > 100 else None,
    }
    for name, right in (
        ("digit", verdict.digit),
        ("digit_and_colour", verdict.digit_and_colour),
        ("weight", verdict.weight),
    ):
        row[name], row[f"{name}_halfwidth"] = mean_and_halfwidth(right)
    return row, images, labels


@click.command()
@click.option(
    "--n", "count", type=click.IntRange(20), default=1000, show_default=True, help="Images for each row."
)
@click.option("--intervals", type=click.IntRange(2), default=40, show_default=True, help="Of DPM-Solver-2.")
@click.option("--family", type=click.Choice(list(FOLDERS)), default="ldm", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/digits_quality[_FAMILY].json."
)
def main(count: int, intervals: int, family: str, out: Path | None) -> None:
    """Class accuracy, Frechet distance and memorisation of a digits backbone, and the judge's own
    accuracy.
    """
    device, of_family = torch.device("cpu"), "" if family == "ldm" else f"_{family}"
    out = out or Path("benchmarks/results") / f"digits_quality{of_family}.json"
    backend, judge = load_backend(Spec(backend="digits", backend_config={"family": family}), device), Judge()
    seen = [c for c in ALL_LABELS if c not in HELD_OUT_LABELS]
    rows, header = [], ["prompts", "guidance", "n", "digit %", "digit+colour %", "weight %", "Frechet %"]
    for guidance in GUIDANCES[family]:
        for name, labels in (("trained combinations", seen), ("never trained", HELD_OUT_LABELS)):
            n = count if name.startswith("trained") else count // 4
            row, images, found = quality(guidance, evaluation_prompts(n, labels), judge, backend, intervals)
            row["prompts"] = name
            if name.startswith("trained"):
                row["nearest_training_scan"] = memorisation(images, found)
            rows.append(row)
    settings = {
        "family": family,
        "solver": f"dpm2, {intervals} intervals",
        "judge": judge_row(judge),
    } | size_of(backend, family)
    write_json(out, settings, rows, device)
    click.echo(f"{settings['parameters'] / 1e6:.2f} M parameters, {settings['bytes'] / 1e6:.2f} MB")
    click.echo(
        "judge on held-out scans:"
        f" {', '.join(f'{k} {100 * v:.2f} %' for k, v in settings['judge'].items())}\n"
    )
    click.echo(text_table(header, [cells(r) for r in rows]))
    for row in rows:
        if "nearest_training_scan" in row:
            found = ", ".join(f"{k} {v:.3f}" for k, v in row["nearest_training_scan"].items())
            click.echo(f"guidance {row['guidance']:g}, distance to the nearest training scan: {found}")


def cells(row: dict) -> list[str]:
    percent = [
        f"{100 * row[k]:.1f} ± {100 * row[k + '_halfwidth']:.1f}"
        for k in ("digit", "digit_and_colour", "weight")
    ]
    frechet = "" if row["frechet_percent"] is None else f"{row['frechet_percent']:.2f}"
    return [row["prompts"], f"{row['guidance']:g}", str(row["n"]), *percent, frechet]


if __name__ == "__main__":
    run_command(main)
