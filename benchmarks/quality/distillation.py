"""Distil digits tables and tableaus for every guidance and depth, and compare them with the baselines.

python -m benchmarks.quality.distillation train      writes exps/digits/grid/ (some hours on two cores) python
-m benchmarks.quality.distillation measure    prints every row, writes the results file python -m
benchmarks.quality.distillation show       prints the grid of docs/results.md; --short: the README's table
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch

from backends import load_backend
from common.errors import run_command
from digits.judge import Judge
from solvers import Spec, UserError

from ..report import RESULTS, text_table, write_json
from .grid_cells import CELLS, DEPTHS, GRID, GUIDANCES, KINDS, WORK, Cell, configurations, distil, gather
from .matched_baselines import HEADER, MatchedComparison, cells_of, headline, summary
from .teacher_reference import TEACHER_INTERVALS, PromptSeeds, TeacherReference

RESULTS_FILE = RESULTS / "distillation.json"
SHORT_GUIDANCE, SHORT_KINDS = 7.5, {"EPD": "epd", "tableau, K = 1": "tableau1", "tableau, K = 2": "wide2"}
FIRST_SEED, TUNING_SEED, TUNING_IMAGES = 300_000, 400_000, 64  # nothing was trained or chosen on these


@click.group()
def main() -> None:
    """Distil the digits grid, or measure it."""


@main.command()
@click.option("--only", default="", help="Only cells whose name holds this text.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=os.cpu_count(),
    show_default=True,
    help="Cells at a time, one thread each.",
)
@click.option("--folder", type=click.Path(path_type=Path), default=GRID)
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Of the cells under way.")
def train(only: str, jobs: int, folder: Path, work: Path) -> None:
    """Distil every cell; one that is there is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    gather(folder, work)
    there = configurations(folder).keys()
    missing = [cell for cell in CELLS if only in cell.name and cell.name not in there]

    def distil_chain(cells: list[Cell]) -> list[str]:
        return [f"{cell.name}: {distil(cell, folder, work)}" for cell in cells]

    # the bank of each guidance first, by one process
    first = {cell.guidance: cell for cell in reversed(missing)}
    for line in distil_chain([first[guidance] for guidance in sorted(first)]):
        click.echo(line)
    chains: dict[tuple[float, int], list[Cell]] = {}
    for cell in missing:
        if cell not in first.values():
            chains.setdefault((cell.guidance, cell.depth), []).append(cell)
    with ThreadPoolExecutor(jobs) as pool:
        for lines in pool.map(distil_chain, chains.values()):
            click.echo("\n".join(lines))
    gather(folder, work)


@main.command()
@click.option(
    "--n", "count", type=click.IntRange(2), default=256, show_default=True, help="Images for each row."
)
@click.option(
    "--guidance",
    type=click.Choice([f"{g:g}" for g in GUIDANCES]),
    help="Only this one; the file keeps its other rows.",
)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=GRID)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS_FILE)
def measure(count: int, guidance: str | None, batch: int, folder: Path, out: Path) -> None:
    """Measure every cell and every baseline on prompts never trained on, with seeds that nothing was trained
    or chosen on.
    """
    backend, judge = load_backend(Spec(backend="digits"), "cpu"), Judge()
    settings = {
        "n": count,
        "batch": batch,
        "teacher_intervals": TEACHER_INTERVALS,
        "first_seed": FIRST_SEED,
        "tuning_seed": TUNING_SEED,
    }
    before = json.loads(out.read_text()) if out.is_file() else {"settings": settings, "rows": []}
    if before["settings"] != settings:
        raise UserError(
            f"{out} was measured with {before['settings']}, not {settings}; remove it, or choose another"
            " --out"
        )
    rows = before["rows"]
    for g in GUIDANCES if guidance is None else [float(guidance)]:
        tuning, reference = (
            TeacherReference.make(backend, g, PromptSeeds.evaluation(n, first, batch))
            for n, first in ((TUNING_IMAGES, TUNING_SEED), (count, FIRST_SEED))
        )
        kinds = {cell.name: cell.kind for cell in CELLS if cell.guidance == g}
        measured = MatchedComparison(reference, tuning, judge, kinds, folder).rows(DEPTHS)
        click.echo(text_table(HEADER, [cells_of(r) for r in measured], text_columns=3))
        rows = sorted([r for r in rows if r["guidance"] != g] + measured, key=lambda r: r["guidance"])
        write_json(out, settings, rows, torch.device("cpu"))


@main.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS_FILE)
@click.option("--whole", is_flag=True, help="Every solver's row as well.")
@click.option("--short", is_flag=True, help="The README's table only.")
def show(results: Path, whole: bool, short: bool) -> None:
    """Print the measured grid: learned solvers over the best baseline of the same serial depth, then of as
    many evaluations.
    """
    rows = json.loads(results.read_text())["rows"]
    if short:
        click.echo(headline(rows, SHORT_GUIDANCE, SHORT_KINDS))
        return
    if whole:
        click.echo(text_table(HEADER, [cells_of(r) for r in rows], text_columns=3) + "\n")
    click.echo(summary(rows, KINDS, "depth"))
    click.echo(summary(rows, KINDS, "evaluations"))


if __name__ == "__main__":
    run_command(main)
