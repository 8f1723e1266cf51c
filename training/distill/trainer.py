"""The distillation loop: batches of the bank, Adam on a few dozen numbers, held-out error, checkpoints and
exports.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import Ranks, StopRequested, distributed_map, never
from solvers import UserError, save_predictor

from ..run_folder import CheckpointTimer, RunFolder, StopRequest
from .bank import Bank
from .baselines import Baseline, errors, mean_error
from .config import DistillConfig
from .gradients import ChunkGradient
from .losses import Loss
from .students.student import Student


class NotFinite(UserError):
    """A loss that is not a finite number."""


@dataclass
class Best:
    """The best parameters so far by held-out error, and since how many evaluations."""

    step: int = -1
    error: float = math.inf
    stale: int = 0
    state: dict = field(default_factory=dict)


@dataclass
class Trainer:
    """One run: what is learned, from what, and where it is written."""

    config: DistillConfig
    ranks: Ranks
    run: RunFolder
    student: Student
    loss: Loss
    train: Bank
    heldout: Bank
    baselines: dict[str, tuple[Baseline, Tensor]]
    kept: list[int]
    """Which of the bank's states are the student's targets."""
    peak_lr: float
    provenance: dict

    def __post_init__(self):
        self.parameters = self.student.parameters()
        self.chunk_row = ChunkGradient(self.student, self.loss, self.train, self.kept, self.config.train)
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.peak_lr)
        self.step = 0
        self.best = Best()
        self.evaluated = -1  # the last step that was evaluated
        self.stop_requested: Callable[[], bool] = never
        self.timer = CheckpointTimer(self.config.train.checkpoint_minutes)

    # one step

    def batch(self, step: int) -> list[int]:
        """The pairs of a step: the bank in a new order each epoch, which only the seed and the step
        decide.
        """
        size, n = self.config.train.batch, len(self.train)
        first = step * size
        epochs = range(first // n, (first + size - 1) // n + 1)
        orders = [
            torch.randperm(n, generator=torch.Generator().manual_seed(1000003 * self.config.train.seed + e))
            for e in epochs
        ]
        order = torch.cat(orders).tolist()
        return order[first - epochs.start * n :][:size]

    def learn(self) -> dict:
        """One step of Adam on the whole batch; what it logs."""
        settings, indices = self.config.train, self.batch(self.step)
        chunks = [indices[i : i + settings.chunk] for i in range(0, len(indices), settings.chunk)]
        rows = distributed_map(
            lambda part: self.chunk_row(chunks[part.start])[None],
            len(chunks),
            1,
            self.ranks,
            self.stop_requested,
        )
        count = sum(p.numel() for p in self.parameters)
        total = rows[:, :-1].sum(0) / len(indices)
        gradient, scores = total[:count], total[count:].tolist()
        if not total.isfinite().all() or (rows[:, -1] >= 0).any():
            self.stop_broken(rows[:, -1])
        record = {"step": self.step + 1, "loss": scores[0]} | dict(
            zip(self.chunk_row.terms, scores[1:], strict=True)
        )
        record |= {"gradient_norm": gradient.norm().item(), "lr": self.set_lr()}
        self.apply(gradient)
        self.step += 1
        return record

    def apply(self, gradient: Tensor) -> None:
        """Clip the gradient, add what holds a tableau near its start, and step."""
        gradient = gradient * min(1.0, self.config.train.clip / (gradient.norm().item() + 1e-12))
        for parameter, part in zip(
            self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter).clone()
        if self.config.loss.start:
            (self.config.loss.start * self.student.module.distance()).backward()
        self.optimiser.step()

    def set_lr(self) -> float:
        """Cosine from the peak to a share of it (Loshchilov and Hutter 2017) over all steps of the
        configuration.
        """
        settings = self.config.train
        share = 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))
        lr = self.peak_lr * (settings.lr_floor + (1 - settings.lr_floor) * share)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    def stop_broken(self, broken: Tensor) -> None:
        """End the run with the last good table saved."""
        intervals = broken[broken >= 0]
        where = f"interval {int(intervals.min())}" if len(intervals) else "its gradient"
        self.save()
        self.export(last=True)
        raise NotFinite(
            f"{self.run.path}: the loss of step {self.step + 1} is not finite ({where}); the table before it"
            f" is saved in {self.run.export}; lower train.lr, or start from another table"
        )

    # held-out error

    def evaluate(self) -> dict:
        """Held-out RMSE of the final state to the teacher, paired with the best baseline of the same serial
        depth.
        """
        with torch.no_grad():
            solver, nodes = self.student.solver()
        batch = self.config.evaluation.batch
        found = errors(self.heldout, solver, nodes, len(self.heldout), batch, self.ranks, self.stop_requested)
        record = {"step": self.step, "heldout": found.mean().item(), "heldout_se": standard_error(found)}
        if self.baselines:
            name, (option, theirs) = min(self.baselines.items(), key=lambda item: item[1][1].mean().item())
            record |= {
                "baseline": name,
                "baseline_schedule": option.schedule,
                "baseline_heldout": theirs.mean().item(),
            }
            record |= {"baseline_se": standard_error(theirs), "difference": (found - theirs).mean().item()}
            record |= {
                "difference_se": standard_error(found - theirs),
                "ratio": found.mean().item() / theirs.mean().item(),
            }
        record |= {"table": self.describe()}
        error = mean_error(found)
        if error < self.best.error or self.best.step < 0:
            state = {k: v.detach().clone() for k, v in self.student.module.state_dict().items()}
            self.best = Best(self.step, error, 0, state)
        else:
            self.best.stale += 1
        self.evaluated = self.step
        return {k: v for k, v in record.items() if not (isinstance(v, float) and not math.isfinite(v))}

    def describe(self) -> dict:
        """The present table for the plots: positions and weights, or noise levels and output row."""
        table = self.student.predictor({}).table
        arrays = (
            table.arrays()
            if self.config.student.kind == "table"
            else {"sigmas": table.sigmas, "output": table.output}
        )
        return {k: v.detach().tolist() for k, v in arrays.items() if v is not None}

    # files

    def state(self) -> dict:
        """Everything that the rest of the run depends on; the order of the pairs follows from the seed and
        the step.
        """
        return {
            "step": self.step,
            "student": self.student.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": asdict(self.best),
            "evaluated": self.evaluated,
            "peak_lr": self.peak_lr,
            "provenance": self.provenance,
            "bank": [self.train.key, self.heldout.key],
            "parent": self.student.parent,
        }

    def save(self) -> None:
        """Write a checkpoint."""
        if self.ranks.rank == 0:
            self.run.save_checkpoint(self.step, self.state())
            self.timer.restart()

    def save_if_due(self, now: bool = False) -> None:
        """Write a checkpoint where one is due now, or by the time since the last; it changes nothing but what
        a crash costs.
        """
        if now or self.timer.due():
            self.save()

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint."""
        if state["bank"] != [self.train.key, self.heldout.key]:
            raise UserError(
                f"{self.run.path}: its bank was {', '.join(state['bank'])}, but the backbone or prompts now"
                " give another"
            )
        if state["parent"] != self.student.parent:
            raise UserError(
                f"{self.run.path}: its student started from {state['parent']}, but student.start now gives"
                f" {self.student.parent}"
            )
        self.student.module.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.best, self.peak_lr = state["step"], Best(**state["best"]), state["peak_lr"]
        self.provenance = state["provenance"]
        self.evaluated = state.get(
            "evaluated", self.step
        )  # absent from earlier checkpoints, which were written after evaluations

    def export(self, last: bool = False) -> None:
        """Write the best table so far, by its step and as best.pkl, and if asked the last one as well."""
        if self.ranks.rank > 0:
            return
        present = {k: v.detach().clone() for k, v in self.student.module.state_dict().items()}
        if last:
            self.write_predictor(self.step, [f"step{self.step:06d}"], None)
        if self.best.state:
            self.student.module.load_state_dict(self.best.state)
            self.write_predictor(self.best.step, [f"step{self.best.step:06d}", "best"], self.best.error)
            self.student.module.load_state_dict(present)

    def write_predictor(self, step: int, names: list[str], error: float | None) -> None:
        """Write the present parameters under some names."""
        told = {"step": step} | ({} if error is None else {"heldout_rmse": error})
        predictor = self.student.predictor(self.provenance | told)
        for name in names:
            save_predictor(predictor, self.run.export / f"network-snapshot-export-{name}.pkl")

    # the loop

    def fit(self, last_step: int, stop: StopRequest, log) -> bool:
        """Learn up to a step; False if asked to stop before. Evaluations fall on fixed steps.

        A step or evaluation that a stop interrupts is abandoned: the state before it is saved, and a resumed
        run does it again.
        """
        self.stop_requested = stop.any_rank
        bar = tqdm(
            total=self.config.train.steps,
            initial=self.step,
            desc="distil",
            unit="step",
            disable=self.ranks.rank > 0 or None,
        )
        with bar:
            try:
                self.learn_until(last_step, log, bar)
                finished = True
            except StopRequested:
                finished = False
        self.save()
        return finished

    def learn_until(self, last_step: int, log, bar: tqdm) -> None:
        """Steps and evaluations up to a step; StopRequested if asked to stop before."""
        self.evaluate_if_due(log, bar)
        self.save_if_due(now=self.step == 0)
        while self.step < last_step and not self.stale():
            log(self.learn())
            bar.update()
            self.save_if_due()
            self.evaluate_if_due(log, bar)
            if self.stop_requested():
                raise StopRequested
            self.save_if_due(now=self.step % self.config.train.checkpoint_interval == 0)

    def evaluate_if_due(self, log, bar: tqdm) -> None:
        """Evaluate and log where this step calls for it and has not been evaluated yet."""
        due = self.step % self.config.evaluation.interval == 0 or self.step == self.config.train.steps
        if not due or self.evaluated == self.step:
            return
        record = self.evaluate()
        log(record)
        bar.set_postfix_str(f"held-out {record.get('heldout', math.nan):.4f}")

    def stale(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.config.train.patience <= self.best.stale


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values."""
    return (values.std() / len(values) ** 0.5).item()
