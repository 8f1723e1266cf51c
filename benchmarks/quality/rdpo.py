"""RDPO on the digits, measured.

    python -m benchmarks.quality.rdpo gain | recipes | estimators | policies | tradeoff

Every table is judged on prompts and seeds that nothing was trained or chosen on, of digits, colours and
weights that the backbone never saw together: the trained reward, the judge that is never trained on, and the
error to the teacher beside it.
"""

import json
from itertools import product

import click

from common.errors import run_command
from solvers import load_predictor

from ..report import RESULTS
from . import rdpo_runs as runs
from .cma_es import cma_es
from .figures import draw_tradeoff
from .rdpo_rows import SEEDS, WORKERS, N, compare_settings, heldout, report, rows_of_runs, tables_of
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


@click.group()
def main() -> None:
    """Measure RDPO on the digits."""


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
