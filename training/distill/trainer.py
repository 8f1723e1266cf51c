"""Distillation: Adam on a few dozen numbers over batches of the bank (EPD-Solver, arXiv 2512.22796, stage
1).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers import UserError, save_predictor

from ..processes import Processes
from ..run_folder import RunFolder
from ..trainer import Intervals, Trainer
from .bank import Bank
from .baselines import Baseline, ErrorMeasure, mean_error, standard_error
from .config import DistillConfig
from .gradients import ChunkGradient
from .losses import Loss
from .students import Student


class NotFinite(UserError):
    """A loss that is not a finite number."""


@dataclass
class Problem:
    """What a student is learned from and compared with."""

    train: Bank
    heldout: Bank
    kept: list[int]
    """Which of the bank's states are the student's targets."""
    loss: Loss
    matched_baselines: dict[str, tuple[Baseline, Tensor]]
    """Baselines of the student's serial depth with their held-out errors."""
    provenance: dict


class DistillTrainer(Trainer):
    """A distillation run."""

    title, module_key = "distil", "student"
    measure, higher_is_better = "error", False
    kept_checkpoints = 2
    config: DistillConfig
    free_settings = frozenset(
        {
            "bank.folder",
            "bank.prompts",  # their content counts, which names the bank
            "bank.heldout_prompts",
            "evaluation.depths",
            "train.checkpoint_interval",
            "train.checkpoint_minutes",
        }
    )

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        problem: Problem,
        run: RunFolder,
        processes: Processes,
    ):
        self.config, self.student = config, student
        self.train, self.heldout, self.provenance = problem.train, problem.heldout, problem.provenance
        self.matched_baselines = problem.matched_baselines
        self.parameters = student.parameters()
        self.chunk_row = ChunkGradient(student, problem.loss, problem.train, problem.kept, config.train)
        self.peak_lr = config.train.lr * student.lr_unit
        optimiser = torch.optim.Adam(self.parameters, lr=self.peak_lr)
        super().__init__(run, processes, student.module, optimiser, intervals_of(config))

    # one step

    def batch(self, step: int) -> list[int]:
        """The pairs of a step: the bank in a new order each epoch, which follows from the seed and
        the step.
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
        settings, indices = self.config.train, self.batch(self.step)
        chunks = [indices[i : i + settings.chunk] for i in range(0, len(indices), settings.chunk)]
        rows = self.processes.map(lambda part: self.chunk_row(chunks[part.start])[None], len(chunks), 1)
        count = sum(p.numel() for p in self.parameters)
        total = rows[:, :-1].sum(0) / len(indices)
        gradient, scores = total[:count], total[count:].tolist()
        if not total.isfinite().all() or (rows[:, -1] >= 0).any():
            self.stop_broken(rows[:, -1])
        record = {
            "step": self.step + 1,
            "loss": scores[0],
            **dict(zip(self.chunk_row.terms, scores[1:], strict=True)),
            "gradient_norm": gradient.norm().item(),
            "lr": self.set_lr(),
        }
        self.apply(gradient)
        self.step += 1
        return record

    def apply(self, gradient: Tensor) -> None:
        """Clip the gradient, add that of the distance from the start, and step."""
        gradient = gradient * min(1.0, self.config.train.clip / (gradient.norm().item() + 1e-12))
        parts = gradient.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
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
        measure = ErrorMeasure(self.processes, self.config.evaluation.batch)
        values = measure(self.heldout, solver, nodes, len(self.heldout))
        record = {
            "step": self.step,
            "heldout": values.mean().item(),
            "heldout_se": standard_error(values),
            **self.comparison(values),
            "table": self.curves(),
        }
        self.compare_with_best(mean_error(values))
        return {k: v for k, v in record.items() if not (isinstance(v, float) and not math.isfinite(v))}

    def comparison(self, values: Tensor) -> dict:
        """Held-out errors beside those of the best baseline of the same serial depth."""
        if not self.matched_baselines:
            return {}
        name, (option, other) = min(self.matched_baselines.items(), key=lambda item: item[1][1].mean().item())
        return {
            "baseline": name,
            "baseline_schedule": option.schedule,
            "baseline_heldout": other.mean().item(),
            "baseline_se": standard_error(other),
            "difference": (values - other).mean().item(),
            "difference_se": standard_error(values - other),
            "ratio": values.mean().item() / other.mean().item(),
        }

    def curves(self) -> dict:
        """The present numbers for the plots."""
        predictor = self.student.predictor({})
        return {k: v.detach().tolist() for k, v in predictor.kind.curves(predictor.table).items()}

    def progress(self, record: dict) -> str | None:
        return f"held-out {record['heldout']:.4f}" if "heldout" in record else None

    # files

    def depends_on(self) -> dict[str, Any]:
        return {"bank": [self.train.key, self.heldout.key], "start (student.start)": self.student.parent}

    def recorded_dependencies(self, state: dict) -> dict[str, Any]:
        earlier = {"bank": state.get("bank"), "start (student.start)": state.get("parent")}
        return state.get("depends_on", earlier)

    def state(self) -> dict:
        return {**super().state(), "peak_lr": self.peak_lr, "provenance": self.provenance}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.peak_lr, self.provenance = state["peak_lr"], state["provenance"]

    def export(self, last: bool = False) -> None:
        """Write the best table so far, by its step and as best.pkl, and with `last` the present one
        as well.
        """
        if not self.processes.first:
            return
        present = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        if last:
            self.write_predictor(self.step, [f"step{self.step:06d}"], None)
        if self.best.state:
            self.module.load_state_dict(self.best.state)
            self.write_predictor(self.best.step, [f"step{self.best.step:06d}", "best"], self.best.value)
            self.module.load_state_dict(present)

    def write_predictor(self, step: int, names: list[str], error: float | None) -> None:
        """Write the present parameters under some names."""
        measured = {} if error is None else {"heldout_rmse": error}
        predictor = self.student.predictor({**self.provenance, "step": step, **measured})
        for name in names:
            save_predictor(predictor, self.run.export / f"network-snapshot-export-{name}.pkl")


def intervals_of(config: DistillConfig) -> Intervals:
    """When a run of a configuration evaluates, writes and ends."""
    train = config.train
    return Intervals(
        steps=train.steps,
        evaluation=config.evaluation.interval,
        checkpoint=train.checkpoint_interval,
        checkpoint_minutes=train.checkpoint_minutes,
        patience=train.patience,
    )
