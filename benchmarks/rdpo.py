"""RDPO on the digits, measured: python -m benchmarks.rdpo gain | estimators | policies | tradeoff.

Every table is judged on prompts and seeds that nothing was trained or chosen on, of digits, colours and weights that the
backbone never saw together: the trained reward, the judge that is never trained on, and the error to the teacher beside it.
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
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from backends import Backend, load_backend
from backends.digits.data import ALL_LABELS, HELD_OUT_LABELS, TEMPLATES, caption, evaluation_prompts, parse
from backends.digits.judge import Judge
from backends.distributed import Ranks
from generation import Sampler
from rewards import Reward, load_reward
from solvers import Predictor, SolverTable, Spec, UserError, load_predictor, save_predictor
from solvers.errors import run_command
from training.config import load_config
from training.distill.bank import rmse_per_image
from training.ppo.config import RDPOConfig
from training.ppo.prepare import load_start, prompts_of, settle
from training.ppo.rollout import Plan, Scorer
from training.run_folder import RunFolder

from .bench import SCHEDULES, Bench, sampler_of
from .figures import draw_tradeoff
from .report import mean_and_halfwidth, text_table, write_json

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "training" / "ppo" / "cfgs" / "digits.yaml"
DISTILLED = ROOT / "exps" / "digits-distilled" / "epd-g7.5-d4" / "network-snapshot-export-best.pkl"
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "build" / "rdpo"
GUIDANCE, DEPTH, FIRST_SEED, TUNING_SEED = 7.5, 4, 600_000, 700_000
FROM_EQUAL = ("ppo.dirichlet_concentration=100", "ppo.learning_rate=0.03", "ppo.steps=150")  # much is to be found: wide steps
SPREADS = (0.05, 0.2)  # of CMA-ES
ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Job:
    """One run of RDPO; it is kept under `WORK`, so that a benchmark which was interrupted goes on where it stopped."""

    name: str
    seed: int
    overrides: tuple[str, ...] = ()
    start: Path = DISTILLED

    @property
    def run_name(self) -> str:
        """A name for exactly this run."""
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
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{job.name}, seed {job.seed}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    run = RunFolder(max(WORK.glob(f"*-{job.run_name}")))
    return load_predictor(run.export / "network-snapshot-export-best.pkl"), run.records()


def train_all(jobs: list[Job], workers: int) -> list[tuple[Predictor, list[dict]]]:
    """Runs side by side, one thread each."""
    WORK.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(train, jobs), total=len(jobs), desc="RDPO runs", unit="run", disable=None))


def cma_es(seed: int, spread: float, start: Path = DISTILLED) -> Predictor:
    """CMA-ES (Hansen 2016, arXiv 1604.00772) on the logits of gaps and weights, with the images that RDPO has.

    Each generation tries 16 tables on the same 4 pairs of prompt and noise, at first with standard deviation `spread`; it has
    the images of RDPO's rollouts and of its evaluations, and ends with the mean of its distribution.
    """
    import cma

    config = load_config(RDPOConfig, CONFIG, [f"data.predictor_snapshot={start}"])
    predictor, _ = load_start(config)
    backend = load_backend(settle(config, predictor), "cpu")
    score = Scorer(backend, predictor.sigmas, GUIDANCE, predictor.spec.afs, predictor.spec.max_order, [load_reward("digits", {}, "cpu")])
    table, population = predictor.table, 16
    edges = torch.nn.functional.pad(table.r, (1, 0)), torch.nn.functional.pad(table.r, (0, 1), value=1.0)
    gaps, shape = (edges[1] - edges[0]).clamp(min=1e-6).log(), table.r.shape
    origin = torch.cat([gaps.flatten(), table.w.clamp(min=1e-6).log().flatten()])

    def tables(points: list) -> SolverTable:
        rows = torch.from_numpy(np.stack(points))
        r = rows[:, : gaps.numel()].view(-1, *gaps.shape).softmax(-1).cumsum(-1)[..., :-1].clamp(max=1.0)
        w = rows[:, gaps.numel() :].view(-1, *shape).softmax(-1)
        scales = {k: v.expand(len(rows), *shape) for k, v in table.arrays().items() if k not in ("r", "w")}
        return SolverTable(r, w, **scales)

    strategy = cma.CMAEvolutionStrategy(origin.tolist(), spread, {"popsize": population, "seed": seed + 1, "verbose": -9})
    prompts = prompts_of(config, "digits")[0]
    evaluations = (config.ppo.steps // config.evaluation.interval + 1) * config.evaluation.images
    for step in range(config.ppo.steps + evaluations // config.ppo.rollout_batch_size):
        plan = Plan.make(prompts, config.ppo, seed, step)
        pairs = config.ppo.rollout_batch_size // population
        points = strategy.ask()
        tried = tables(points)
        chosen = [i * config.ppo.rloo_k for i in range(pairs)]
        per_image = SolverTable(**{k: v.repeat_interleave(pairs, 0) for k, v in tried.arrays().items()})
        rewards = score(per_image, [plan.prompts[i] for i in chosen] * population, [plan.seeds[i] for i in chosen] * population)
        strategy.tell(points, (-rewards.view(population, pairs).mean(1)).tolist())
    best = tables([np.asarray(strategy.result.xfavorite)])
    return Predictor(SolverTable(**{k: v[0] for k, v in best.arrays().items()}), predictor.spec, predictor.sigmas)


@dataclass(frozen=True)
class Exam:
    """Prompts, seeds and teacher images, and who marks them."""

    bench: Bench
    reward: Reward
    judge: Judge

    @classmethod
    def make(cls, backend: Backend, n: int) -> "Exam":
        """At least n images, as many of each prompt."""
        own = fresh_prompts()
        prompts = own * -(-n // len(own))
        bench = Bench.make(backend, GUIDANCE, len(prompts), FIRST_SEED, 64, keep=WORK, prompts=prompts)
        return cls(bench, load_reward("digits", {}, "cpu"), Judge())

    def sampler(self, name: str, predictor: Predictor) -> Sampler:
        return Sampler(self.bench.backend, predictor.solver(), name, predictor.sigmas, GUIDANCE)

    def mark(self, sampler: Sampler) -> dict[str, Tensor]:
        """Image by image: trained reward, judge's verdict, error to the teacher; and the judge's features."""
        latents, images, _ = self.bench.run(sampler)
        return self.mark_images(latents, images)

    def by_prompt(self, values: Tensor) -> Tensor:
        """The mean of each prompt's values: images of one prompt are not independent."""
        return values.view(-1, len(set(self.bench.prompts))).mean(0)

    def mark_images(self, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        verdict = self.judge(images, [parse(p) for p in self.bench.prompts])
        return {
            "reward": self.reward(images, self.bench.prompts).double(),
            "digit_and_colour": verdict.digit_and_colour.double(),
            "rmse": rmse_per_image(latents, self.bench.teacher[0]),
            "features": verdict.features,
        }

    def row(self, name: str, sampler: Sampler | None, marks: dict[str, Tensor], base: dict[str, Tensor] | None = None) -> dict:
        """Means with half a 95 % interval, and paired gains over `base`."""
        row: dict = {
            "solver": name,
            "depth": sampler.cost.depth if sampler else None,
            "evaluations": sampler.cost.evaluations if sampler else None,
        }
        for key in ("reward", "digit_and_colour", "rmse"):
            row[key], row[f"{key}_halfwidth"] = mean_and_halfwidth(self.by_prompt(marks[key]))
            if base is not None:
                row[f"{key}_gain"], row[f"{key}_gain_halfwidth"] = mean_and_halfwidth(self.by_prompt(marks[key] - base[key]))
        return row | {"frechet_percent": self.judge.frechet(marks["features"])}


def fresh_prompts() -> list[str]:
    """Captions of the combinations that the backbone was never trained on, none of which training or its evaluation uses."""
    known = set(evaluation_prompts(len(ALL_LABELS)))
    return [text for t in TEMPLATES for c in sorted(HELD_OUT_LABELS, key=str) if (text := caption(c, t)) not in known]


HEADER = ["solver", "depth", "evals", "reward", "gain in reward", "digit+colour %", "gain", "Frechet %", "RMSE to teacher"]


def cells_of(row: dict) -> list[str]:
    """A row of the printed table."""

    def gain(key: str, factor: float = 1) -> str:
        return f"{factor * row[f'{key}_gain']:+.4g} ± {factor * row[f'{key}_gain_halfwidth']:.2g}" if f"{key}_gain" in row else ""

    return [
        row["solver"],
        str(row["depth"] or ""),
        str(row["evaluations"] or ""),
        f"{row['reward']:.4f} ± {row['reward_halfwidth']:.4f}",
        gain("reward"),
        f"{100 * row['digit_and_colour']:.1f} ± {100 * row['digit_and_colour_halfwidth']:.1f}",
        gain("digit_and_colour", 100),
        f"{row['frechet_percent']:.2f}",
        f"{row['rmse']:.3f} ± {row['rmse_halfwidth']:.3f}",
    ]


def report(name: str, n: int, rows: list[dict], exam: Exam) -> None:
    """Print a table and write its JSON."""
    click.echo(text_table(HEADER, [cells_of(r) for r in rows]))
    write_json(RESULTS / f"rdpo_{name}.json", {"n": n, "guidance": GUIDANCE, "first_seed": FIRST_SEED}, rows, exam.bench.backend.device)


def uniform_start(backend: Backend) -> Path:
    """The start table without a teacher: equally spaced points, equal weights, as many intervals as the distilled table."""
    WORK.mkdir(parents=True, exist_ok=True)
    sigmas = backend.sigmas(Spec(num_steps=DEPTH // 2 + 1, schedule_type="discrete"))
    spec = Spec(backend="digits", num_steps=len(sigmas), num_points=2, schedule_type="discrete", guidance_rate=GUIDANCE)
    save_predictor(Predictor(SolverTable.uniform(DEPTH // 2, 2), spec, sigmas), WORK / "uniform.pkl")
    return WORK / "uniform.pkl"


@click.group()
def main() -> None:
    """Measure RDPO on the digits."""


N = click.option("--n", "count", type=click.IntRange(2), default=1024, show_default=True, help="Images for each row.")
WORKERS = click.option("--workers", type=click.IntRange(1), default=os.cpu_count(), show_default=True, help="Runs side by side.")
SEEDS = click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Training seeds.")


@main.command()
@N
@WORKERS
@SEEDS
def gain(count: int, workers: int, seeds: int) -> None:
    """From the distilled table and from equal points, against the baselines, the teacher and CMA-ES."""
    backend = load_backend(Spec(backend="digits"), "cpu")
    exam, tuning = Exam.make(backend, count), Bench.make(backend, GUIDANCE, 48, TUNING_SEED, 64)
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
        for seed, (predictor, _) in enumerate(train_all([Job(label, s, more, start) for s in range(seeds)], workers)):
            tuned = exam.sampler(label, predictor)
            rows.append(exam.row(f"RDPO from {label}, seed {seed}", tuned, exam.mark(tuned), base))
        for spread, seed in product(SPREADS if label == "distilled" else (), range(seeds)):
            tuned = exam.sampler("cma", cma_es(seed, spread, start))
            rows.append(exam.row(f"CMA-ES from {label}, spread {spread:g}, seed {seed}", tuned, exam.mark(tuned), base))
    report("gain", count, rows, exam)


def compare_settings(name: str, count: int, workers: int, seeds: int, settings: dict[str, tuple[str, ...]]) -> list[dict]:
    """Several settings of RDPO from the distilled table, each with several training seeds."""
    backend = load_backend(Spec(backend="digits"), "cpu")
    exam = Exam.make(backend, count)
    sampler = exam.sampler("EPD distilled", load_predictor(DISTILLED))
    base = exam.mark(sampler)
    rows = [exam.row("EPD distilled", sampler, base)]
    jobs = [Job(label, seed, overrides) for label, overrides in settings.items() for seed in range(seeds)]
    for job, (predictor, records) in zip(jobs, train_all(jobs, workers), strict=True):
        tuned = exam.sampler(job.name, predictor)
        row = exam.row(f"{job.name}, seed {job.seed}", tuned, exam.mark(tuned), base)
        steps = [r for r in records if "advantage_std" in r]
        chosen = max(r["gain_digits"] for r in records if "gain_digits" in r)
        row |= {"setting": job.name, "gain_where_chosen": chosen, "advantage_std": sum(r["advantage_std"] for r in steps) / len(steps)}
        reached = [r["step"] for r in records if "gain_digits" in r and r["gain_digits"] > r["gain_digits_halfwidth"]]
        rows.append(row | {"first_step_with_gain": min(reached, default=None)})
    report(name, count, rows, exam)
    click.echo(text_table(SETTING_HEADER, [setting_cells([r for r in rows if r.get("setting") == label]) for label in settings]))
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
    """One setting over its training seeds: mean gains, and the first evaluation of each seed whose interval lies above 0."""

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
    """Shared or independent noise, the group's own or the published baseline, at the same number of images."""
    pairs = [(noise, baseline) for noise in ("shared", "independent") for baseline in ("prompt", "mixed")]
    more = ("evaluation.interval=10",)
    compare_settings(
        "estimators", count, workers, seeds, {f"{n}, {b}": (f"ppo.group_noise={n}", f"ppo.baseline={b}", *more) for n, b in pairs}
    )


@main.command()
@N
@WORKERS
@SEEDS
def policies(count: int, workers: int, seeds: int) -> None:
    """A residual table against the published MLP, each with three learning rates."""
    tried = {"table": (0.003, 0.01, 0.03), "mlp": (0.0003, 0.001, 0.003)}
    settings = {f"{kind}, lr {lr:g}": (f"ppo.policy={kind}", f"ppo.learning_rate={lr}") for kind, rates in tried.items() for lr in rates}
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
