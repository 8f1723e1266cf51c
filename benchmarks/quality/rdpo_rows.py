"""What the benchmarks of RDPO share: a row for each run and each setting, their tables and their JSON."""

import os

import click
import torch

from backends import load_backend
from solvers import Spec, load_predictor

from ..report import RESULTS, text_table, write_json
from .heldout_eval import FIRST_SEED, HEADER, HeldoutEvaluation, cells_of
from .rdpo_runs import GUIDANCE, WORK, Job, train_all

N = click.option(
    "--n", "count", type=click.IntRange(2), default=1024, show_default=True, help="Images for each row."
)
WORKERS = click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count(), show_default=True, help="Runs side by side."
)
SEEDS = click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training seeds.")


SETTING_HEADER = [
    "setting",
    "gain in its evaluation",
    "gain",
    "sd over seeds",
    "digit+colour %",
    "RMSE",
    "advantage sd",
    "first gain at step",
]


COST_HEADER = ["setting", "seconds a step of 64 images", "highest memory, MiB"]


def cost_cells(setting: str, row: dict) -> list[str]:
    """What a step of a setting costs."""
    return [setting, f"{row['seconds_a_step']:.2f}", f"{row['memory_mib']:.0f}"]


def setting_cells(rows: list[dict]) -> list[str]:
    """One setting over its training seeds: mean gains, and the first evaluation of each seed whose interval
    lies above 0.
    """

    def mean(key: str) -> float:
        return sum(r.get(key, 0.0) for r in rows) / len(rows)

    spread = torch.tensor([r["reward_gain"] for r in rows]).std().item() if len(rows) > 1 else 0.0
    return [
        rows[0]["setting"],
        f"{mean('gain_where_chosen'):+.4f}" if "gain_where_chosen" in rows[0] else "-",
        f"{mean('reward_gain'):+.4f}",
        f"{spread:.4f}",
        f"{100 * mean('digit_and_colour_gain'):+.1f}",
        f"{mean('rmse_gain'):+.3f}",
        f"{mean('advantage_std'):.4f}" if mean("advantage_std") else "-",
        " ".join(str(r.get("first_step_with_gain") or "-") for r in rows),
    ]


def training_of(records: list[dict]) -> dict:
    """What the metrics of a run say: the gain of its best evaluation, the spread of advantages, the first
    gain beyond its interval.
    """
    steps = [r for r in records if "advantage_std" in r]
    reached = [
        r["step"] for r in records if "gain_digits" in r and r["gain_digits"] > r["gain_digits_halfwidth"]
    ]
    return {
        "gain_where_chosen": max(r["gain_digits"] for r in records if "gain_digits" in r),
        "advantage_std": sum(r["advantage_std"] for r in steps) / max(1, len(steps)),  # 0: it has none
        "first_step_with_gain": min(reached, default=None),
    }


def report(name: str, n: int, rows: list[dict]) -> None:
    """Print a table of the runs and one of the settings, and write their JSON."""
    settings = {"n": n, "guidance": GUIDANCE, "first_seed": FIRST_SEED}
    write_json(RESULTS / f"rdpo_{name}.json", settings, rows, torch.device("cpu"))
    click.echo(tables_of(rows))


def tables_of(rows: list[dict]) -> str:
    """A table of the runs and, where they have settings, one of these over their seeds."""
    tables = [text_table(HEADER, [cells_of(r) for r in rows])]
    if labels := dict.fromkeys(row["setting"] for row in rows if "setting" in row):
        of_settings = [[r for r in rows if r.get("setting") == label] for label in labels]
        tables.append(text_table(SETTING_HEADER, [setting_cells(group) for group in of_settings]))
    if costs := {row["setting"]: row for row in rows if "seconds_a_step" in row}:
        tables.append(text_table(COST_HEADER, [cost_cells(*cost) for cost in costs.items()]))
    return "\n\n".join(tables)


def heldout(count: int, family: str = "ldm", guidance: float = GUIDANCE) -> HeldoutEvaluation:
    """The held-out evaluation on a digits backbone; its teacher images are kept with the runs."""
    spec = Spec(backend="digits", backend_config={} if family == "ldm" else {"family": family})
    return HeldoutEvaluation.make(load_backend(spec, "cpu"), guidance, count, WORK)


def rows_of_runs(evaluation: HeldoutEvaluation, name: str, jobs: list[Job], workers: int) -> list[dict]:
    """The row of the start table that some runs share, and a row of each run with its gains over it."""
    start = evaluation.sampler(name, load_predictor(jobs[0].start))
    base = evaluation.measure(start)
    rows = [evaluation.row(name, start, base)]
    for job, (predictor, records) in zip(jobs, train_all(jobs, workers), strict=True):
        tuned = evaluation.sampler(job.name, predictor)
        row = evaluation.row(f"{job.name}, seed {job.seed}", tuned, evaluation.measure(tuned), base)
        rows.append(row | {"setting": job.name} | training_of(records))
    return rows


def compare_settings(
    name: str, count: int, workers: int, seeds: int, settings: dict[str, tuple[str, ...]]
) -> list[dict]:
    """Several settings of RDPO from the distilled table, each with several training seeds."""
    jobs = [Job(label, seed, overrides) for label, overrides in settings.items() for seed in range(seeds)]
    rows = rows_of_runs(heldout(count), "EPD distilled", jobs, workers)
    report(name, count, rows)
    return rows
