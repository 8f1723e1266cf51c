"""The command lines of both training stages on small problems: how a run is started, stopped and compared."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from backends import load_backend
from digits.data import training_prompts
from solvers import Predictor, SolverTable, Spec, UserError, save_predictor
from training.distill import launch as distill
from training.distill import plots
from training.ppo import launch as ppo
from training.processes import StopRequest
from training.run_folder import RunFolder
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
CPU = ("--device", "cpu")  # where runs in processes of their own are too
DISTILL_CONFIG = """
backend: {name: gaussian}
guidance_scale: 3.0
nodes: {num_steps: 4, schedule: polynomial}
student: {num_points: 2}
teacher: {inner: 3, check: 4}
bank: {folder: FOLDER/banks, prompts: FOLDER/prompts.txt, pairs: 16, heldout_pairs: 8, shard_size: 8}
train: {steps: 6, batch: 8, chunk: 2, checkpoint_interval: 2}
evaluation: {interval: 2, batch: 4, baselines: [euler, ipndm2], schedules: [polynomial], tuning_pairs: 8}
"""
RDPO_CONFIG = """
run: {run_name: small}
data: {predictor_snapshot: FOLDER/start.pkl, prompt_csv: FOLDER/prompts.txt}
reward: {type: digits}
ppo: {rollout_batch_size: 8, rloo_k: 2, rollout_chunk: 4, minibatch_size: 4, ppo_epochs: 2, steps: 6,
  learning_rate: 0.05,
  dirichlet_concentration: 30}
evaluation: {interval: 2, images: 6, batch: 4}
logging: {save_interval: 2}
"""
RDPO_NODES = load_backend(Spec(backend="gaussian"), "cpu").sigmas(
    Spec(num_steps=3, schedule_type="polynomial")
)
RDPO_SPEC = Spec(backend="gaussian", num_steps=3, num_points=2, schedule_type="polynomial", guidance_rate=7.5)


def write_distill_config(folder: Path) -> Path:
    """A small distillation and its prompts."""
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    path = folder / "small.yaml"
    path.write_text(DISTILL_CONFIG.replace("FOLDER", str(folder)))
    return path


def write_rdpo_config(folder: Path) -> Path:
    """A small RDPO run, its start table and its prompts."""
    (folder / "prompts.txt").write_text("\n".join(training_prompts(20)))
    save_predictor(Predictor(SolverTable.uniform(2, 2), RDPO_SPEC, RDPO_NODES), folder / "start.pkl")
    path = folder / "small.yaml"
    path.write_text(RDPO_CONFIG.replace("FOLDER", str(folder)))
    return path


def overrides(*texts: str) -> list[str]:
    """Settings "section.key=value" as options."""
    return [part for text in texts for part in ("--override", text)]


def invoke(main: click.Command, *arguments: object) -> str:
    """What a command printed; it must end well."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def error_of(main: click.Command, *arguments: object) -> str:
    """The one line with which a command refuses its arguments."""
    with pytest.raises(UserError) as caught:
        invoke(main, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@dataclass(frozen=True)
class Stage:
    """A training stage: its command line, a small configuration, its entries in checkpoints and settings."""

    module: str
    main: click.Command
    root: str
    """The option for the folder of run folders."""
    write_config: Callable[[Path], Path]
    module_key: str
    checkpoints: tuple[str, str]
    """The settings for steps and for minutes between checkpoints."""
    exports: str
    """The exported tables that are the same whether a run stopped on the way or not."""

    @property
    def configs(self) -> Path:
        """The folder of the shipped configurations."""
        return ROOT / self.module.replace(".", "/").replace("/launch", "/cfgs")

    def arguments(self, folder: Path, name: str, *texts: str, more: tuple = ()) -> list[str]:
        """The command line of a new run of the small configuration, with settings over it."""
        config = folder / "small.yaml"
        if not config.exists():
            self.write_config(folder)
        options = ("--config", config, self.root, folder / "exps", "--run-name", name)
        return [str(a) for a in (*options, *CPU, *overrides(*texts), *more)]

    def run_of(self, folder: Path, name: str) -> RunFolder:
        """The run of a name."""
        return RunFolder(next((folder / "exps").glob(f"*-{name}")))

    def start(self, folder: Path, name: str, *texts: str, more: tuple = ()) -> RunFolder:
        """Run the small configuration to its end in this process."""
        invoke(self.main, *self.arguments(folder, name, *texts, more=more))
        return self.run_of(folder, name)

    def resume(self, run: RunFolder) -> None:
        """Go on with a run to its end, without the tables of where it had stopped."""
        for path in run.export.glob(f"*-{run.latest_checkpoint().stem}.pkl"):
            path.unlink()
        invoke(self.main, "--resume", run.path, self.root, run.path.parent, *CPU)

    def error(self, *arguments: object) -> str:
        """The one line with which the command refuses its arguments."""
        return error_of(self.main, *arguments)

    def outcome(self, run: RunFolder) -> dict[str, bytes]:
        """All that must be the same to the byte, whatever happened on the way."""
        state = run.load_checkpoint()
        moments = state["optimiser"]["state"].items()
        return {
            **{f.name: f.read_bytes() for f in (run.metrics, *sorted(run.export.glob(self.exports)))},
            **{k: v.numpy().tobytes() for k, v in state[self.module_key].items()},
            **{f"{i} {k}": v.numpy().tobytes() for i, s in moments for k, v in s.items()},
        }


DISTILL = Stage(
    "training.distill.launch",
    distill.main,
    "--exps",
    write_distill_config,
    "student",
    ("train.checkpoint_interval", "train.checkpoint_minutes"),
    "*.pkl",
)
RDPO = Stage(
    "training.ppo.launch",
    ppo.main,
    "--output-root",
    write_rdpo_config,
    "policy",
    ("logging.save_interval", "logging.save_minutes"),
    "*-best.pkl",
)
STAGES = [pytest.param(DISTILL, id="distill"), pytest.param(RDPO, id="rdpo")]


class StopAtCheck:
    """A run in this process that is asked to stop by the time of its n-th look for a stop request; counts all
    looks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int):
        self.number, self.checks = number, 0
        monkeypatch.setattr(StopRequest, "any_rank", lambda request: self.check())

    def check(self) -> bool:
        self.checks += 1
        return self.checks >= self.number


def run_slowly(module: str, arguments: list[str], seconds: float = 0.3) -> None:
    """The command line in a process of its own, where each step after the third waits."""
    import runpy
    import sys

    original = Trainer.evaluate_if_due

    def slow(self, log, bar):
        if self.step > 3:
            time.sleep(seconds)
        original(self, log, bar)

    Trainer.evaluate_if_due = slow
    plots.draw = lambda run, trainer, curves: None
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
