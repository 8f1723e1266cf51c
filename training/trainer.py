"""The training loop that distillation and RDPO share: steps, held-out evaluations, the best parameters,
checkpoints, stops.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common.distributed import StopRequested
from solvers import UserError

from .checkpoint import canonical, check_settings, check_state, settings_of
from .clock import Clock
from .processes import Processes, StopRequest
from .run_folder import RunError, RunFolder

LogFunction = Callable[[dict, dict[str, float]], None]  # a record, and seconds by part of the work


@dataclass(frozen=True)
class Intervals:
    """When a run evaluates, writes and ends, in steps."""

    steps: int
    """All steps of the configuration."""
    evaluation: int
    checkpoint: int
    checkpoint_minutes: float | None
    """A checkpoint is written after so many minutes too; None for never."""
    patience: int
    """Evaluations without a better one that end a run; 0 for never."""
    log: int = 1


@dataclass
class Best:
    """The best parameters so far by the held-out measure; `stale` counts the evaluations since."""

    step: int = -1
    value: float | None = None
    stale: int = 0
    state: dict = field(default_factory=dict)


class CheckpointTimer:
    """Whether a checkpoint is due because so many minutes passed since the last one; None for never."""

    def __init__(self, minutes: float | None):
        self.minutes, self.last = minutes, time.monotonic()

    def due(self) -> bool:
        """Whether the time is up."""
        return self.minutes is not None and time.monotonic() - self.last >= 60 * self.minutes

    def restart(self) -> None:
        """Count from now."""
        self.last = time.monotonic()


class Trainer(ABC):
    """One run: a module whose few parameters an optimiser learns, evaluated on held-out prompts and seeds.

    The names of a stage's entries in a checkpoint are those of its published runs: `module_key` for the
    module and `measure` for the best held-out value.
    """

    title: str
    module_key: str
    measure: str
    higher_is_better: bool
    kept_checkpoints: int
    free_settings: frozenset[str]
    """What may change when a run goes on: sections, or keys "section.key"."""
    config: object

    def __init__(
        self,
        run: RunFolder,
        processes: Processes,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        intervals: Intervals,
    ):
        self.run, self.processes, self.intervals = run, processes, intervals
        self.module, self.optimiser = module, optimiser
        self.step, self.best = 0, Best()
        self.evaluated = -1  # the last step that was evaluated
        self.clock = Clock()
        self.timer = CheckpointTimer(intervals.checkpoint_minutes)

    @abstractmethod
    def learn(self) -> dict:
        """One step; what it logs."""

    @abstractmethod
    def evaluate(self) -> dict:
        """Measure the present parameters on held-out pairs and compare them with the best; what it logs."""

    @abstractmethod
    def depends_on(self) -> dict[str, Any]:
        """What must be the same when a run goes on, by its name in messages."""

    def progress(self, record: dict) -> str | None:
        """What the progress bar shows after a record; None leaves it."""
        return None

    def warning(self, record: dict) -> str | None:
        """What a user should know after an evaluation."""
        return None

    # the loop

    def fit(self, last_step: int, stop: StopRequest, log: LogFunction) -> bool:
        """Learn up to a step; False if asked to stop before. Evaluations fall on fixed steps.

        A step or evaluation that a stop interrupts is abandoned: the state before it is saved, and a resumed
        run does it again.
        """
        self.processes = replace(self.processes, stop_requested=stop.any_rank)
        bar = tqdm(
            total=self.intervals.steps,
            initial=self.step,
            desc=self.title,
            unit="step",
            disable=not self.processes.first or None,
        )
        with bar:
            try:
                self.learn_until(last_step, log, bar)
                finished = True
            except StopRequested:
                finished = False
        self.save()
        return finished

    def learn_until(self, last_step: int, log: LogFunction, bar: tqdm) -> None:
        """Steps and evaluations up to a step; StopRequested if asked to stop before."""
        self.evaluate_if_due(log, bar)
        self.save_if_due(now=self.step == 0)
        while self.step < last_step and not 0 < self.intervals.patience <= self.best.stale:
            record = self.learn()
            if self.step % self.intervals.log == 0 or "skipped" in record:
                log(record, self.clock.read())
            bar.update()
            self.show(record, bar)
            self.save_if_due()
            self.evaluate_if_due(log, bar)
            if self.processes.stop_requested():
                raise StopRequested
            self.save_if_due(now=self.step % self.intervals.checkpoint == 0)

    def evaluate_if_due(self, log: LogFunction, bar: tqdm) -> None:
        """Evaluate and log where this step calls for it and has not been evaluated yet."""
        due = self.step % self.intervals.evaluation == 0 or self.step == self.intervals.steps
        if not due or self.evaluated == self.step:
            return
        record = self.evaluate()
        log(record, self.clock.read())
        self.show(record, bar)
        if self.step > 0 and (text := self.warning(record)):
            self.processes.echo(text)

    def show(self, record: dict, bar: tqdm) -> None:
        """Put a record on the progress bar."""
        if (text := self.progress(record)) is not None:
            bar.set_postfix_str(text)

    def compare_with_best(self, value: float) -> None:
        """Keep the present parameters if their held-out value is the best so far."""
        best = self.best.value
        if best is None or (value > best if self.higher_is_better else value < best):
            state = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
            self.best = Best(self.step, value, 0, state)
        else:
            self.best.stale += 1
        self.evaluated = self.step

    # checkpoints

    def state(self) -> dict:
        """Everything that the rest of the run depends on; orders and random numbers follow from the seed and
        the step.
        """
        best = {"step": self.best.step, "stale": self.best.stale, "state": self.best.state}
        return {
            "depends_on": self.depends_on(),
            "settings": settings_of(self.config, self.free_settings),
            "step": self.step,
            self.module_key: self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": {**best, self.measure: self.best.value},
            "evaluated": self.evaluated,
        }

    def save(self) -> None:
        """Write a checkpoint."""
        if self.processes.first:
            self.run.save_checkpoint(self.step, canonical(self.state()), self.kept_checkpoints)
            self.timer.restart()

    def save_if_due(self, now: bool = False) -> None:
        """Write a checkpoint where one is due now, or by the time since the last; it changes nothing but what
        a crash costs.
        """
        if now or self.timer.due():
            self.save()

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint; where something changed that the run depends on, or where it is not one of
        such a run: UserError.
        """
        keys = frozenset({"step", "best", "optimiser", self.module_key})
        check_state(self.run.path, state, keys, self.intervals.steps)
        # absent from earlier checkpoints
        check_settings(
            self.run.config, state.get("settings", {}), settings_of(self.config, self.free_settings)
        )
        recorded = self.recorded_dependencies(state)
        for name, value in self.depends_on().items():
            if recorded.get(name) != value:
                raise UserError(
                    f"{self.run.path}: its {name} changed since its checkpoint; restore it, or start a new"
                    " run"
                )
        self.load(state)
        self.step, best = state["step"], state["best"]
        value = best[self.measure] if best["step"] >= 0 else None
        self.best = Best(best["step"], value, best["stale"], best["state"])
        # absent from earlier checkpoints, which were written after evaluations
        self.evaluated = state.get("evaluated", self.step)

    def load(self, state: dict) -> None:
        """Put the numbers of a checkpoint into the module and the optimiser; of other shapes: RunError."""
        try:
            self.module.load_state_dict(state[self.module_key])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise RunError(
                f"{self.run.path}: its checkpoint does not fit its configuration ({reason}); remove the"
                " checkpoint to go on from the one before, or start a new run"
            ) from None

    def recorded_dependencies(self, state: dict) -> dict[str, Any]:
        """The depends_on of a checkpoint."""
        return state["depends_on"]
