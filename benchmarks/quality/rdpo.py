"""RDPO on the digits, measured.

    python -m benchmarks.quality.rdpo gain | recipes | estimators | policies | tradeoff

Every table is judged on prompts and seeds that nothing was trained or chosen on, of digits, colours and
weights that the backbone never saw together: the trained reward, the judge that is never trained on, and the
error to the teacher beside it.
"""

import json
import os
from itertools import product

import click
import torch

from backends import load_backend
from common.errors import run_command
from solvers import Spec, load_predictor

from ..report import RESULTS, text_table, write_json
from . import rdpo_runs as runs
from .cma_es import cma_es
from .figures import draw_tradeoff
from .heldout_eval import FIRST_SEED, HEADER, HeldoutEvaluation, cells_of
from .rdpo_runs import DEPTH, GUIDANCE, Job, train_all, uniform_start
from .teacher_reference import SCHEDULES, PromptSeeds, TeacherReference, sampler_of

TUNING_SEED = 700_000
# wide steps: equal points are far from the best table
FROM_EQUAL = ("ppo.dirichlet_concentration=100", "ppo.learning_rate=0.03", "ppo.steps=150")
SPREADS = (0.05, 0.2)  # of CMA-ES
IMAGES = 5120  # that each recipe rolls out
RECOMMENDED = ()  # the shipped configuration
# Stable Diffusion 1.5's, in every key; as many images, and evaluations at the same numbers of images
PUBLISHED = (
    "ppo.policy=mlp",
    "ppo.group_noise=independent",
    "ppo.baseline=mixed",
    "ppo.max_log_change=20",
    "ppo.dirichlet_concentration=20",
    "ppo.learning_rate=7e-5",
    "ppo.rollout_batch_size=8",
    "ppo.rollout_chunk=8",
    "ppo.minibatch_size=4",
    "ppo.ppo_epochs=1",
    f"ppo.steps={IMAGES // 8}",
    f"evaluation.interval={IMAGES // 8 // 4}",
    f"logging.save_interval={IMAGES // 8 // 4}",
)
# what a null concentration and rate are from equal points
WIDE = ("ppo.dirichlet_concentration=100", "ppo.learning_rate=0.03")
RECIPES = {  # by start
    "distilled": {"published": PUBLISHED, "recommended": RECOMMENDED},
    "equal points": {"published": PUBLISHED, "as from a distilled table": RECOMMENDED, "recommended": WIDE},
}


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


def setting_cells(rows: list[dict]) -> list[str]:
    """One setting over its training seeds: mean gains, and the first evaluation of each seed whose interval
    lies above 0.
    """

    def mean(key: str) -> float:
        return sum(r[key] for r in rows) / len(rows)

    spread = torch.tensor([r["reward_gain"] for r in rows]).std().item() if len(rows) > 1 else 0.0
    return [
        rows[0]["setting"],
        f"{mean('gain_where_chosen'):+.4f}",
        f"{mean('reward_gain'):+.4f}",
        f"{spread:.4f}",
        f"{100 * mean('digit_and_colour_gain'):+.1f}",
        f"{mean('rmse_gain'):+.3f}",
        f"{mean('advantage_std'):.4f}",
        " ".join(str(r["first_step_with_gain"] or "-") for r in rows),
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
        "advantage_std": sum(r["advantage_std"] for r in steps) / len(steps),
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
    return "\n\n".join(tables)


def heldout(count: int) -> HeldoutEvaluation:
    """The held-out evaluation on the digits backbone; its teacher images are kept with the runs."""
    return HeldoutEvaluation.make(load_backend(Spec(backend="digits"), "cpu"), GUIDANCE, count, runs.WORK)


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


@click.group()
def main() -> None:
    """Measure RDPO on the digits."""


N = click.option(
    "--n", "count", type=click.IntRange(2), default=1024, show_default=True, help="Images for each row."
)
WORKERS = click.option(
    "--workers", type=click.IntRange(1), default=os.cpu_count(), show_default=True, help="Runs side by side."
)
SEEDS = click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training seeds.")


@main.command()
@N
@WORKERS
@SEEDS
def gain(count: int, workers: int, seeds: int) -> None:
    """From the distilled table and from equal points, against the baselines, the teacher and CMA-ES."""
    evaluation = heldout(count)
    reference = evaluation.reference
    backend = reference.backend
    tuning = TeacherReference.make(backend, GUIDANCE, PromptSeeds.evaluation(48, TUNING_SEED))
    rows = [evaluation.row("teacher", None, evaluation.measure_images(*reference.teacher[:2]))]
    for name in ("euler", "dpmpp", "unipc"):
        options = [sampler_of(backend, GUIDANCE, name, DEPTH, s) for s in SCHEDULES]
        best = min(options, key=tuning.error)
        rows.append(evaluation.row(name, best, evaluation.measure(best)))
    for label, start in (("distilled", runs.DISTILLED), ("equal points", uniform_start(backend))):
        sampler = evaluation.sampler(label, load_predictor(start))
        base = evaluation.measure(sampler)
        rows.append(evaluation.row(f"EPD {label}", sampler, base))
        overrides = () if label == "distilled" else FROM_EQUAL
        jobs = [Job(label, seed, overrides, start) for seed in range(seeds)]
        tables = {
            f"RDPO from {label}, seed {job.seed}": predictor
            for job, (predictor, _) in zip(jobs, train_all(jobs, workers), strict=True)
        }
        for spread, seed in product(SPREADS if label == "distilled" else (), range(seeds)):
            name = f"CMA-ES from {label}, spread {spread:g}, seed {seed}"
            tables[name] = cma_es(runs.CONFIG, start, seed, spread)
        for name, predictor in tables.items():
            tuned = evaluation.sampler(name, predictor)
            rows.append(evaluation.row(name, tuned, evaluation.measure(tuned), base))
    report("gain", count, rows)


@main.command()
@N
@WORKERS
@SEEDS
def recipes(count: int, workers: int, seeds: int) -> None:
    """The published settings against the recommended ones with as many images, from the distilled table and
    from equal points.
    """
    evaluation = heldout(count)
    starts = {"distilled": runs.DISTILLED, "equal points": uniform_start(evaluation.reference.backend)}
    rows = []
    for label, start in starts.items():
        settings = RECIPES[label].items()
        jobs = [Job(f"{name}, {label}", i, more, start) for name, more in settings for i in range(seeds)]
        rows += rows_of_runs(evaluation, f"start: {label}", jobs, workers)
    report("recipes", count, rows)


@main.command()
@N
@WORKERS
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True)
def estimators(count: int, workers: int, seeds: int) -> None:
    """Shared or independent noise, the group's own or the published baseline, at the same number of
    images.
    """
    pairs = [(noise, baseline) for noise in ("shared", "independent") for baseline in ("prompt", "mixed")]
    more = ("evaluation.interval=10",)
    compare_settings(
        "estimators",
        count,
        workers,
        seeds,
        {f"{n}, {b}": (f"ppo.group_noise={n}", f"ppo.baseline={b}", *more) for n, b in pairs},
    )


@main.command()
@N
@WORKERS
@SEEDS
def policies(count: int, workers: int, seeds: int) -> None:
    """A residual table against the published MLP, each with three learning rates."""
    tried = {"table": (0.003, 0.01, 0.03), "mlp": (0.0003, 0.001, 0.003)}
    settings = {
        f"{kind}, lr {lr:g}": (f"ppo.policy={kind}", f"ppo.learning_rate={lr}")
        for kind, rates in tried.items()
        for lr in rates
    }
    compare_settings("policies", count, workers, seeds, settings)


@main.command()
@N
@WORKERS
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
def tradeoff(count: int, workers: int, seeds: int) -> None:
    """Reward against fidelity: concentrations and KL targets."""
    settings = {f"concentration {c}": (f"ppo.dirichlet_concentration={c}",) for c in (100, 300, 1000, 3000)}
    settings |= {f"KL target {k:g}": (f"ppo.kl_target={k}", "ppo.kl_coef=0.01") for k in (0.3, 1.0, 3.0)}
    rows = compare_settings("tradeoff", count, workers, seeds, settings)
    draw_tradeoff(RESULTS / "rdpo_tradeoff.png", rows)


@main.command()
@click.argument("name", type=click.Choice(["gain", "recipes", "estimators", "policies", "tradeoff"]))
def show(name: str) -> None:
    """Print the tables of committed results."""
    click.echo(tables_of(json.loads((RESULTS / f"rdpo_{name}.json").read_text())["rows"]))


if __name__ == "__main__":
    run_command(main)
