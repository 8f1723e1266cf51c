"""RDPO on the digits, measured.

    python -m benchmarks.quality.rdpo gain | recipes | estimators | policies | tradeoff

Every table is judged on prompts and seeds that nothing was trained or chosen on, of digits, colours and
weights that the backbone never saw together: the trained reward, the judge that is never trained on, and the
error to the teacher beside it.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import torch
from tqdm import tqdm

from backends import Backend, load_backend
from common.distributed import Ranks
from common.errors import run_command
from solvers import Predictor, SolverTable, Spec, UserError, load_predictor, save_predictor
from training.run_folder import RunFolder

from ..report import text_table, write_json
from .cma_es import cma_es
from .figures import draw_tradeoff
from .heldout_eval import FIRST_SEED, HEADER, Exam, cells_of
from .teacher_reference import SCHEDULES, Bench, sampler_of

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "ppo" / "cfgs" / "digits.yaml"
DISTILLED = ROOT / "exps" / "digits" / "distilled.pkl"
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "rdpo"
GUIDANCE, DEPTH, TUNING_SEED = 7.5, 4, 700_000
FROM_EQUAL = (
    "ppo.dirichlet_concentration=100",
    "ppo.learning_rate=0.03",
    "ppo.steps=150",
)  # much is to be found: wide steps
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
WIDE = (
    "ppo.dirichlet_concentration=100",
    "ppo.learning_rate=0.03",
)  # what a null concentration and rate are from equal points
RECIPES = {  # by start
    "distilled": {"published": PUBLISHED, "recommended": RECOMMENDED},
    "equal points": {"published": PUBLISHED, "as from a distilled table": RECOMMENDED, "recommended": WIDE},
}
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """One run of RDPO; it is kept under `WORK`, so that a benchmark which was interrupted goes on where it
    stopped.
    """

    name: str
    seed: int
    overrides: tuple[str, ...] = ()
    start: Path = DISTILLED

    @property
    def run_name(self) -> str:
        """A name that follows from configuration, start table, seed and overrides; remove `WORK` when the
        training code changes.
        """
        told = CONFIG.read_bytes() + self.start.read_bytes() + repr((self.seed, self.overrides)).encode()
        return hashlib.sha256(told).hexdigest()[:16]

    def arguments(self) -> list[str]:
        """What the command line of the training is told."""
        for path in WORK.glob(f"*-{self.run_name}"):
            if RunFolder(path).latest_checkpoint() is not None:
                return ["--resume", str(path)]
        told = [f"run.seed={self.seed}", f"data.predictor_snapshot={self.start}", *self.overrides]
        overrides = [part for text in told for part in ("--override", text)]
        return ["--config", str(CONFIG), "--output-root", str(WORK), "--run-name", self.run_name, *overrides]


def train(job: Job) -> tuple[Predictor, list[dict]]:
    """The exported predictor of a run and its metrics."""
    command = [sys.executable, "-m", "training.ppo.launch", *job.arguments()]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"{job.name}, seed {job.seed}: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    run = RunFolder(max(WORK.glob(f"*-{job.run_name}")))
    return load_predictor(run.export / "network-snapshot-export-best.pkl"), run.records()


def train_all(jobs: list[Job], workers: int) -> list[tuple[Predictor, list[dict]]]:
    """Runs side by side, one thread each."""
    WORK.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(train, jobs), total=len(jobs), desc="RDPO runs", unit="run", disable=None))


def report(name: str, n: int, rows: list[dict], exam: Exam) -> None:
    """Print a table and write its JSON."""
    click.echo(text_table(HEADER, [cells_of(r) for r in rows]))
    write_json(
        RESULTS / f"rdpo_{name}.json",
        {"n": n, "guidance": GUIDANCE, "first_seed": FIRST_SEED},
        rows,
        exam.bench.backend.device,
    )


def uniform_start(backend: Backend) -> Path:
    """The start table without a teacher: equally spaced points, equal weights, as many intervals as the
    distilled table.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    sigmas = backend.sigmas(Spec(num_steps=DEPTH // 2 + 1, schedule_type="discrete"))
    spec = Spec(
        backend="digits",
        num_steps=len(sigmas),
        num_points=2,
        schedule_type="discrete",
        guidance_rate=GUIDANCE,
    )
    save_predictor(Predictor(SolverTable.uniform(DEPTH // 2, 2), spec, sigmas), WORK / "uniform.pkl")
    return WORK / "uniform.pkl"


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
    backend = load_backend(Spec(backend="digits"), "cpu")
    exam, tuning = (
        Exam.make(backend, GUIDANCE, count, WORK),
        Bench.make(backend, GUIDANCE, 48, TUNING_SEED, 64),
    )
    rows = [exam.row("teacher", None, exam.mark_images(*exam.bench.teacher[:2]))]
    for name in ("euler", "dpmpp", "unipc"):
        options = [sampler_of(backend, GUIDANCE, name, DEPTH, s) for s in SCHEDULES]
        best = min(options, key=tuning.error)
        rows.append(exam.row(name, best, exam.mark(best)))
    for label, start in (("distilled", DISTILLED), ("equal points", uniform_start(backend))):
        sampler = exam.sampler(label, load_predictor(start))
        base = exam.mark(sampler)
        rows.append(exam.row(f"EPD {label}", sampler, base))
        more = () if label == "distilled" else FROM_EQUAL
        for seed, (predictor, _) in enumerate(
            train_all([Job(label, s, more, start) for s in range(seeds)], workers)
        ):
            tuned = exam.sampler(label, predictor)
            rows.append(exam.row(f"RDPO from {label}, seed {seed}", tuned, exam.mark(tuned), base))
        for spread, seed in product(SPREADS if label == "distilled" else (), range(seeds)):
            tuned = exam.sampler("cma", cma_es(CONFIG, start, seed, spread))
            rows.append(
                exam.row(
                    f"CMA-ES from {label}, spread {spread:g}, seed {seed}", tuned, exam.mark(tuned), base
                )
            )
    report("gain", count, rows, exam)


@main.command()
@N
@WORKERS
@SEEDS
def recipes(count: int, workers: int, seeds: int) -> None:
    """The published settings against the recommended ones with as many images, from the distilled table and
    from equal points.
    """
    backend = load_backend(Spec(backend="digits"), "cpu")
    exam = Exam.make(backend, GUIDANCE, count, WORK)
    starts = {"distilled": DISTILLED, "equal points": uniform_start(backend)}
    jobs = [
        Job(f"{n}, {s}", i, o, starts[s]) for s in starts for n, o in RECIPES[s].items() for i in range(seeds)
    ]
    trained = dict(zip(jobs, train_all(jobs, workers), strict=True))
    rows = []
    for label, start in starts.items():
        sampler = exam.sampler(label, load_predictor(start))
        base = exam.mark(sampler)
        rows.append(exam.row(f"start: {label}", sampler, base))
        for job in (j for j in jobs if j.start == start):
            predictor, records = trained[job]
            tuned = exam.sampler(job.name, predictor)
            row = exam.row(f"{job.name}, seed {job.seed}", tuned, exam.mark(tuned), base)
            rows.append(row | {"setting": job.name} | training_of(records))
    report("recipes", count, rows, exam)
    settings = dict.fromkeys(row["setting"] for row in rows if "setting" in row)
    click.echo(
        text_table(
            SETTING_HEADER, [setting_cells([r for r in rows if r.get("setting") == s]) for s in settings]
        )
    )


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


def compare_settings(
    name: str, count: int, workers: int, seeds: int, settings: dict[str, tuple[str, ...]]
) -> list[dict]:
    """Several settings of RDPO from the distilled table, each with several training seeds."""
    backend = load_backend(Spec(backend="digits"), "cpu")
    exam = Exam.make(backend, GUIDANCE, count, WORK)
    sampler = exam.sampler("EPD distilled", load_predictor(DISTILLED))
    base = exam.mark(sampler)
    rows = [exam.row("EPD distilled", sampler, base)]
    jobs = [Job(label, seed, overrides) for label, overrides in settings.items() for seed in range(seeds)]
    for job, (predictor, records) in zip(jobs, train_all(jobs, workers), strict=True):
        tuned = exam.sampler(job.name, predictor)
        row = exam.row(f"{job.name}, seed {job.seed}", tuned, exam.mark(tuned), base)
        rows.append(row | {"setting": job.name} | training_of(records))
    report(name, count, rows, exam)
    click.echo(
        text_table(
            SETTING_HEADER,
            [setting_cells([r for r in rows if r.get("setting") == label]) for label in settings],
        )
    )
    return rows


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


if __name__ == "__main__":
    run_command(main)
