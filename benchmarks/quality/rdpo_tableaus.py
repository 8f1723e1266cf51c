"""RDPO of learned tableaus on the digits, measured: what it gains, what it changes beside, and its rivals.

    python -m benchmarks.quality.rdpo_tableaus gain | anchors | rivals | families

All are judged as in benchmarks.quality.rdpo; rows state depth and NFE, and what is compared has the same
number of images.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import click
from torch import Tensor

from common.errors import run_command
from solvers import Predictor, load_predictor, save_predictor

from ..report import RESULTS, mean_and_halfwidth
from . import rdpo_runs as runs
from .cma_es import cma_es
from .heldout_eval import HeldoutEvaluation
from .rdpo_rows import SEEDS, WORKERS, N, heldout, report, rows_of_runs, tables_of
from .rdpo_runs import Job
from .step_costs import step_cost

GRID = runs.ROOT / "exps" / "digits" / "grid"
SHIPPED = runs.ROOT / "exps" / "digits" / "best.pkl"  # RDPO of the distilled EPD table
GAUSSIAN = ("ppo.policy=gaussian", "ppo.learning_rate=null")
KL = (0.0, 0.01, 0.02, 0.05)
SPREADS = (0.3, 1.0)  # of CMA-ES, in standard deviations of the Gaussian policy
RATES = (0.01, 0.05)  # of backpropagation
FAMILIES = {"sd3": 4.5, "flux": 3.5}  # and the guidance of their tables


@dataclass(frozen=True)
class Group:
    """Settings from one start table, each with several training seeds."""

    start: Path
    name: str
    settings: dict[str, tuple[str, ...]]

    def jobs(self, seeds: int) -> list[Job]:
        """A run of each setting and seed."""
        pairs = [(label, seed) for label in self.settings for seed in range(seeds)]
        return [Job(label, seed, self.settings[label], self.start) for label, seed in pairs]


def gain_groups() -> list[Group]:
    """Both policies, depths 4 and 6, one, 1.5 and two evaluations a level, and weights of the KL penalty."""
    gaussian = {f"tableau1, depth 4, kl_coef {kl:g}": (*GAUSSIAN, f"ppo.kl_coef={kl}") for kl in KL}
    return [
        Group(
            runs.DISTILLED,
            "EPD distilled, depth 4",
            {"EPD, depth 4, Dirichlet": (), "EPD compiled, depth 4, Gaussian": GAUSSIAN},
        ),
        Group(GRID / "tableau1-g7.5-d4.pkl", "tableau1 distilled, depth 4", gaussian),
        Group(GRID / "wide2-g7.5-d4.pkl", "wide2 distilled, depth 4", {"wide2, depth 4": GAUSSIAN}),
        Group(GRID / "epd-g7.5-d6.pkl", "EPD distilled, depth 6", {"EPD, depth 6, Dirichlet": ()}),
        Group(GRID / "tableau1-g7.5-d6.pkl", "tableau1 distilled, depth 6", {"tableau1, depth 6": GAUSSIAN}),
    ]


def over_shipped(evaluation: HeldoutEvaluation, predictor: Predictor, shipped: dict[str, Tensor]) -> dict:
    """Paired gains of a table over the shipped RDPO table of EPD, in reward and judge."""
    values = evaluation.measure(evaluation.sampler("tuned", predictor))
    row = {}
    for key in ("reward", "digit_and_colour", "rmse"):
        gain = mean_and_halfwidth(evaluation.by_prompt(values[key] - shipped[key]))
        row[f"{key}_over_shipped"], row[f"{key}_over_shipped_halfwidth"] = gain
    return row


@click.group()
def main() -> None:
    """Measure RDPO of learned tableaus on the digits."""


@main.command()
@N
@WORKERS
@SEEDS
def gain(count: int, workers: int, seeds: int) -> None:
    """What RDPO gains for each kind of table, beside the shipped RDPO table of EPD."""
    evaluation = heldout(count)
    shipped = load_predictor(SHIPPED)
    sampler = evaluation.sampler("EPD RDPO, shipped, depth 4", shipped)
    values = evaluation.measure(sampler)
    rows = [evaluation.row("EPD RDPO, shipped, depth 4", sampler, values)]
    for group in gain_groups():
        jobs = group.jobs(seeds)
        first, *tuned = rows_of_runs(evaluation, group.name, jobs, workers)
        rows.append(first)
        for job, row in zip(jobs, tuned, strict=True):
            rows.append(row | over_shipped(evaluation, runs.train(job)[0], values))
    report("tableau_gain", count, rows)


def anchor_settings() -> dict[str, tuple[str, ...]]:
    """No bound, bounds on KL and on the change of the latents, and levels that stay."""
    bounds = {
        "no bound": (),
        "KL at most 1 nat": ("ppo.anchor.kl=1.0",),
        "latents at most 5 %": ("ppo.anchor.latents=0.05",),
        "latents at most 10 %": ("ppo.anchor.latents=0.1",),
        "early levels only (2, 3 stay)": ("ppo.frozen_levels=[2,3]",),
        "late levels only (0, 1 stay)": ("ppo.frozen_levels=[0,1]",),
    }
    return {name: (*GAUSSIAN, "ppo.kl_coef=0.0", *more) for name, more in bounds.items()}


@main.command()
@N
@WORKERS
@SEEDS
def anchors(count: int, workers: int, seeds: int) -> None:
    """Reward against the judge, the error to the teacher and the Frechet distance, for bounds on the drift
    and for levels that stay.
    """
    group = Group(GRID / "tableau1-g7.5-d4.pkl", "tableau1 distilled, depth 4", anchor_settings())
    report("anchors", count, rows_of_runs(heldout(count), group.name, group.jobs(seeds), workers))


@main.command()
@N
@WORKERS
@SEEDS
def rivals(count: int, workers: int, seeds: int) -> None:
    """RDPO, CMA-ES and reward backpropagation with the same number of images, and what a step of each
    costs.
    """
    evaluation, start = heldout(count), GRID / "tableau1-g7.5-d4.pkl"
    plain = (*GAUSSIAN, "ppo.kl_coef=0.0")
    backprop = {
        f"backpropagation, lr {rate:g}": (*plain, "ppo.estimator=backprop", f"ppo.learning_rate={rate}")
        for rate in RATES
    }
    group = Group(start, "tableau1 distilled, depth 4", {"RDPO": plain, **backprop})
    costs = {name: step_cost("rdpo", start, settings) for name, settings in group.settings.items()}
    rows = rows_of_runs(evaluation, group.name, group.jobs(seeds), workers)
    base = evaluation.measure(evaluation.sampler(group.name, load_predictor(start)))
    for row in rows[1:]:
        row |= costs[row["setting"]]
    cost = step_cost("cma", start, plain)
    for spread in SPREADS:
        name = f"CMA-ES, spread {spread:g}"
        for seed in range(seeds):
            tuned = kept_cma_es(start, seed, spread, plain)
            sampler = evaluation.sampler(name, tuned)
            row = evaluation.row(f"{name}, seed {seed}", sampler, evaluation.measure(sampler), base)
            rows.append(row | cost | {"setting": name})
    report("rivals", count, rows)


def kept_cma_es(start: Path, seed: int, spread: float, settings: tuple[str, ...]) -> Predictor:
    """The table that CMA-ES ends with; it is kept with the runs."""
    job = Job(f"cma-{spread:g}", seed, (*settings, f"spread={spread}"), start)
    path = runs.WORK / f"cma-{job.run_name}.pkl"
    if not path.exists():
        save_predictor(cma_es(runs.CONFIG, start, seed, spread, settings), path)
    return load_predictor(path)


@main.command()
@N
@WORKERS
@SEEDS
def families(count: int, workers: int, seeds: int) -> None:
    """Both policies from the distilled tables of the SD3 and the FLUX twin."""
    rows = []
    for family, guidance in FAMILIES.items():
        start = runs.ROOT / "exps" / f"digits-{family}" / "distilled.pkl"
        own = (f"model.guidance_rate={guidance}", f"model.backend_options.family={family}")
        settings = {f"{family}, Dirichlet": own, f"{family}, Gaussian": (*own, *GAUSSIAN)}
        group = Group(start, f"{family}, EPD distilled", settings)
        evaluation = heldout(count, family, guidance)
        rows += rows_of_runs(evaluation, group.name, group.jobs(seeds), workers)
    report("families", count, rows)


@main.command()
@click.argument("name", type=click.Choice(["tableau_gain", "anchors", "rivals", "families"]))
def show(name: str) -> None:
    """Print the tables of committed results."""
    click.echo(tables_of(json.loads((RESULTS / f"rdpo_{name}.json").read_text())["rows"]))


if __name__ == "__main__":
    run_command(main)
