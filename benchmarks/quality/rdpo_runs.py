"""Runs of RDPO on the digits, kept in `WORK`: an interrupted benchmark goes on where it stopped."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from backends import Backend
from solvers import Predictor, SolverTable, Spec, UserError, load_predictor, save_predictor
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "training" / "ppo" / "cfgs" / "digits.yaml"
DISTILLED = ROOT / "exps" / "digits" / "distilled.pkl"
WORK = ROOT / "build" / "rdpo"
GUIDANCE, DEPTH = 7.5, 4


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
        content = CONFIG.read_bytes() + self.start.read_bytes() + repr((self.seed, self.overrides)).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def arguments(self) -> list[str]:
        """The arguments of training.ppo.launch: a new run, or the rest of one that was stopped."""
        for path in WORK.glob(f"*-{self.run_name}"):
            if RunFolder(path).latest_checkpoint() is not None:
                return ["--resume", str(path)]
        texts = [f"run.seed={self.seed}", f"data.predictor_snapshot={self.start}", *self.overrides]
        overrides = [part for text in texts for part in ("--override", text)]
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
