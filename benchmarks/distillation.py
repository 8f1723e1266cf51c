"""Distil digits tables and tableaus for every guidance and depth, and hold them against the baselines.

python -m benchmarks.distillation train      writes exps/digits-distilled/<cell>/ (an hour or two on two cores)
python -m benchmarks.distillation measure    prints the whole grid, writes benchmarks/results/distillation.json
python -m benchmarks.distillation show       prints the README's summary of that file
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends import load_backend
from backends.digits.data import parse
from backends.digits.judge import Judge
from generation import Sampler
from solvers import BASELINES, Spec, UserError, load_predictor
from solvers.errors import run_command
from training.distill.bank import rmse_per_image

from .bench import SCHEDULES, TEACHER_INTERVALS, Bench, has_depth, sampler_of
from .report import mean_and_halfwidth, text_table, write_json

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "training" / "distill" / "cfgs"
GUIDANCES, DEPTHS = (1.0, 3.0, 7.5), (4, 6, 8, 10)
FIRST_SEED, TUNING_SEED, TUNING_IMAGES = 300_000, 400_000, 64  # nothing was trained or chosen on these
KEPT = ("export/network-snapshot-export-best.pkl", "configs/resolved_config.yaml", "logs/metrics.jsonl")


@dataclass(frozen=True)
class Cell:
    """One table to distil."""

    kind: str
    guidance: float
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind}-g{self.guidance:g}-d{self.depth}"

    def arguments(self, folder: Path) -> list[str]:
        """The configuration of training.distill.launch; a wide tableau starts from a narrower one of the folder."""
        overrides = [f"guidance_scale={self.guidance}", "evaluation.depths=[]"]
        if self.kind in ("epd", "plugin"):
            order = [f"student.max_order={2 if self.kind == 'plugin' else 1}"]
            return arguments("digits", [*overrides, f"nodes.num_steps={self.depth // 2 + 1}", *order])
        points = int(self.kind[-1])
        overrides += [f"student.depth={self.depth}", f"student.num_points={points}"]
        if self.kind.startswith("wide"):
            start = [f"student.start={self.narrower(folder)}", "student.widen=true", f"student.first_points={points}"]
            pace = ["train.lr=0.05", "student.resolution=0.1", f"train.steps={80 if points == 2 else 60}", "evaluation.interval=20"]
            return arguments("digits_tableau", [*overrides, *start, *pace])
        stages = 1 + points * (self.depth - 1)
        # many stages at high guidance amplify what they are given: smaller steps, as in the file
        steep = self.guidance == 7.5 and stages >= 10
        pace = [] if steep else ["train.lr=0.1", "student.resolution=0.1", "train.steps=200"]
        return arguments("digits_tableau", [*overrides, *pace])

    def narrower(self, folder: Path) -> Path:
        """The table from which a wide tableau starts: the one before it, or the better of the two that started from a baseline."""
        kinds = WIDE_STARTS[self.kind]
        paths = [folder / replace(self, kind=kind).name / "network-snapshot-export-best.pkl" for kind in kinds]
        return min(paths, key=lambda path: load_predictor(path).provenance["heldout_rmse"])


def arguments(config: str, overrides: list[str]) -> list[str]:
    """A shipped configuration and overrides as command-line arguments."""
    return ["--config", str(CONFIGS / f"{config}.yaml"), *[part for o in overrides for part in ("--override", o)]]


KINDS = ("epd", "plugin", "tableau1", "tableau2", "wide2", "wide3", "wide4")
WIDE_STARTS = {"wide2": ("tableau1", "tableau2"), "wide3": ("wide2",), "wide4": ("wide3",)}
CELLS = [Cell(kind, g, d) for g in GUIDANCES[::-1] for d in DEPTHS for kind in KINDS]


def distil(cell: Cell, folder: Path) -> str:
    """Run one cell to its end and keep its best table, configuration and log; returns its last words."""
    with tempfile.TemporaryDirectory() as exps:
        command = [sys.executable, "-m", "training.distill.launch", *cell.arguments(folder), "--exps", exps, "--run-name", cell.name]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{cell.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        run = next(Path(exps).glob(f"*-{cell.name}"))
        (folder / cell.name).mkdir(parents=True, exist_ok=True)
        for file in KEPT:
            shutil.copy(run / file, folder / cell.name / Path(file).name)
    return next(line for line in done.stdout.splitlines() if line.startswith("best table"))


@click.group()
def main() -> None:
    """Distil the digits grid, or measure it."""


@main.command()
@click.option("--only", default="", help="Only cells whose name holds this text.")
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count(), show_default=True, help="Cells at a time, one thread each.")
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "exps" / "digits-distilled")
def train(only: str, jobs: int, folder: Path) -> None:
    """Distil every cell; one that is there is left as it is."""

    def missing() -> list[Cell]:
        return [c for c in CELLS if only in c.name and not (folder / c.name / "metrics.jsonl").is_file()]

    for guidance in sorted({c.guidance for c in missing()}):  # the bank of each guidance first, by one process
        first = next(c for c in missing() if c.guidance == guidance)
        click.echo(f"{first.name}: {distil(first, folder)}")
    chains = {(c.guidance, c.depth): [d for d in missing() if (d.guidance, d.depth) == (c.guidance, c.depth)] for c in missing()}
    with ThreadPoolExecutor(jobs) as pool:
        for words in pool.map(lambda chain: [f"{cell.name}: {distil(cell, folder)}" for cell in chain], chains.values()):
            click.echo("\n".join(words))


def learned_sampler(backend, guidance: float, path: Path) -> Sampler:
    """The sampler of a distilled predictor."""
    predictor = load_predictor(path)
    if predictor.spec.guidance_rate != guidance:
        raise UserError(f"{path} was made for guidance {predictor.spec.guidance_rate}, not {guidance}")
    return Sampler(backend, predictor.solver(), path.parent.name, predictor.sigmas, guidance)


def row_of(name: str, sampler: Sampler, found: tuple[Tensor, Tensor, float], bench: Bench, judge: Judge) -> tuple[dict, Tensor]:
    """What is said of a solver, and its errors image by image."""
    latents, images, _ = found
    errors = rmse_per_image(latents, bench.teacher[0])
    rmse, half = mean_and_halfwidth(errors)
    pixels, pixels_half = mean_and_halfwidth(rmse_per_image(images, bench.teacher[1]))
    verdict = judge(images, [parse(p) for p in bench.prompts])
    right, right_half = mean_and_halfwidth(verdict.digit_and_colour)
    return {
        "solver": name,
        "guidance": bench.guidance,
        "depth": sampler.cost.depth,
        "evaluations": sampler.cost.evaluations,
        "rmse": rmse,
        "rmse_halfwidth": half,
        "pixels": pixels,
        "pixels_halfwidth": pixels_half,
        "digit_and_colour": right,
        "digit_and_colour_halfwidth": right_half,
        "frechet_percent": judge.frechet(verdict.features),
    }, errors


def compare_depth(bench: Bench, tuning: Bench, depth: int, folder: Path, judge: Judge) -> list[dict]:
    """All solvers of a serial depth, baselines first, each with its paired difference to the best baseline."""
    rows, errors = [], []
    for name in [n for n in BASELINES if has_depth(n, depth)]:
        options = [sampler_of(bench.backend, bench.guidance, name, depth, s) for s in SCHEDULES]
        tuned = [tuning.error(option) for option in options]
        best = tuned.index(min(tuned))
        row, error = row_of(name, options[best], bench.run(options[best]), bench, judge)
        rows.append(row | {"schedule": SCHEDULES[best]})
        errors.append(error)
    rival = min(range(len(rows)), key=lambda i: rows[i]["rmse"])
    for cell in [c for c in CELLS if c.guidance == bench.guidance and c.depth == depth]:
        sampler = learned_sampler(bench.backend, bench.guidance, folder / cell.name / "network-snapshot-export-best.pkl")
        row, error = row_of(cell.kind, sampler, bench.run(sampler), bench, judge)
        rows.append(row | {"schedule": "learned"})
        errors.append(error)
    for row, error in zip(rows, errors, strict=True):
        difference, half = mean_and_halfwidth(error - errors[rival])
        row |= {"best_baseline": rows[rival]["solver"], "ratio": row["rmse"] / rows[rival]["rmse"]}
        row |= {"difference": difference, "difference_halfwidth": half}
    return rows


HEADER = [
    "guidance",
    "solver",
    "schedule",
    "depth",
    "evals",
    "RMSE to teacher",
    "x best",
    "difference",
    "pixels",
    "digit+colour %",
    "Frechet %",
]


def cells_of(row: dict) -> list[str]:
    """A row of the printed table."""
    return [
        f"{row['guidance']:g}",
        row["solver"],
        row["schedule"],
        str(row["depth"]),
        str(row["evaluations"]),
        f"{row['rmse']:.4f} ± {row['rmse_halfwidth']:.4f}",
        f"{row['ratio']:.2f}",
        f"{row['difference']:+.4f} ± {row['difference_halfwidth']:.4f}",
        f"{row['pixels']:.4f}",
        f"{100 * row['digit_and_colour']:.1f}",
        f"{row['frechet_percent']:.2f}",
    ]


@main.command()
@click.option("--n", "count", type=click.IntRange(2), default=512, show_default=True, help="Images for each row.")
@click.option("--guidance", type=click.Choice([f"{g:g}" for g in GUIDANCES]), help="Only this one.")
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=ROOT / "exps" / "digits-distilled")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "distillation.json")
def measure(count: int, guidance: str | None, batch: int, folder: Path, out: Path) -> None:
    """Measure every cell and every baseline on prompts never trained on, with seeds that nothing was trained or chosen on."""
    backend, judge, rows = load_backend(Spec(backend="digits"), "cpu"), Judge(), []
    for g in GUIDANCES if guidance is None else [float(guidance)]:
        tuning = Bench.make(backend, g, TUNING_IMAGES, TUNING_SEED, batch)
        bench = Bench.make(backend, g, count, FIRST_SEED, batch)
        for depth in tqdm(DEPTHS, desc=f"guidance {g:g}", disable=None):
            rows += compare_depth(bench, tuning, depth, folder, judge)
    click.echo(text_table(HEADER, [cells_of(r) for r in rows], text_columns=3))
    settings = {"n": count, "batch": batch, "teacher_intervals": TEACHER_INTERVALS, "first_seed": FIRST_SEED, "tuning_seed": TUNING_SEED}
    write_json(out, settings, rows, torch.device("cpu"))


SUMMARY = [
    "guidance",
    "depth",
    "best baseline",
    "its RMSE",
    "pixels",
    "Frechet %",
    *[f"{k}: x RMSE, pixels, Frechet % (evals)" for k in KINDS],
]


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "distillation.json")
def show(results: Path) -> None:
    """Print each cell of the measured grid: the learned solvers against the best baseline of the same serial depth."""
    rows = json.loads(results.read_text())["rows"]
    lines = []
    for g in GUIDANCES:
        for depth in DEPTHS:
            here = {r["solver"]: r for r in rows if r["guidance"] == g and r["depth"] == depth}
            rival = here[next(iter(here.values()))["best_baseline"]]
            line = [f"{g:g}", str(depth), f"{rival['solver']} ({rival['schedule']}, {rival['evaluations']} evals)", f"{rival['rmse']:.4f}"]
            line += [f"{rival['pixels']:.4f}", f"{rival['frechet_percent']:.2f}"]
            for kind in KINDS:
                r = here[kind]
                half = r["difference_halfwidth"] / rival["rmse"]
                line.append(f"{r['ratio']:.2f} ± {half:.2f}, {r['pixels']:.4f}, {r['frechet_percent']:.2f} ({r['evaluations']})")
            lines.append(line)
    click.echo(text_table(SUMMARY, lines, text_columns=3))


if __name__ == "__main__":
    run_command(main)
