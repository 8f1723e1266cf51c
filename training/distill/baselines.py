"""Held-out errors of the classical solvers, each computed once for a bank and kept beside it."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from backends import SCHEDULES, Backend, BackendError
from common.files import write_atomically
from solvers import BASELINES, Solver, Spec, UserError, baseline_of, num_steps_for_depth, sample

from ..processes import Processes
from .bank import Bank, rmse_per_image
from .config import EvaluationConfig


@dataclass(frozen=True)
class Baseline:
    """A classical solver of a serial depth on the nodes of a schedule."""

    name: str
    schedule: str
    depth: int
    nodes: Tensor
    solver: Solver


def baseline(backend: Backend, spec: Spec, name: str, depth: int, schedule: str) -> Baseline | None:
    """A baseline, or None where the solver has no such depth or the backbone no such schedule."""
    try:
        num_steps = num_steps_for_depth(BASELINES[name], depth)
        nodes = backend.sigmas(Spec(**{**vars(spec), "num_steps": num_steps, "schedule_type": schedule}))
    except (UserError, BackendError):
        return None
    return Baseline(name, schedule, depth, nodes, baseline_of(name, backend.flow))


@dataclass(frozen=True)
class ErrorMeasure:
    """RMSE of final states to the teacher's, in batches shared over the processes."""

    processes: Processes
    batch: int

    def __call__(self, bank: Bank, solver: Solver, nodes: Tensor, count: int) -> Tensor:
        """The errors of a solver on the first `count` pairs of a bank: [count], in float64."""

        def measure(part: slice) -> Tensor:
            with torch.inference_mode():
                condition, x, states = bank.rows(list(range(part.start, part.stop)))
                velocity = bank.measuring.velocity(bank.backend, condition)
                return rmse_per_image(sample(solver, velocity, x, nodes), states[-1])

        return self.processes.map(measure, count, self.batch)


class Baselines:
    """The baselines of a spec at any serial depth, each with the schedule that suits it best on the tuning
    pairs.
    """

    def __init__(
        self, train: Bank, heldout: Bank, spec: Spec, config: EvaluationConfig, errors: ErrorMeasure
    ):
        self.train, self.heldout, self.spec, self.errors = train, heldout, spec, errors
        self.names, self.schedules = config.baselines, config.schedules or SCHEDULES
        self.tuning = config.tuning_pairs

    def at(self, depth: int) -> dict[str, tuple[Baseline, Tensor]]:
        """By name: the baseline of a serial depth and its held-out errors, best on the tuning pairs first."""
        chosen = []
        for name in self.names:
            options = [
                baseline(self.train.backend, self.spec, name, depth, schedule) for schedule in self.schedules
            ]
            tried = [
                (mean_error(self.cached(self.train, option, self.tuning)), i, option)
                for i, option in enumerate(options)
                if option
            ]
            chosen += [min(tried)] if tried and min(tried)[0] < math.inf else []
        ordered = sorted(chosen, key=lambda c: c[0])
        return {b.name: (b, self.cached(self.heldout, b, len(self.heldout))) for _, _, b in ordered}

    def cached(self, bank: Bank, option: Baseline, count: int) -> Tensor:
        """The errors of a baseline on the first pairs of a bank, from the bank's folder if they are known."""
        kind = option.name if option.solver == BASELINES[option.name] else f"{option.name}-flow"
        name = f"{kind}-{option.schedule}-depth{option.depth}-{count}-batch{self.errors.batch}.safetensors"
        path, processes = bank.folder / "errors" / name, self.errors.processes
        known = processes.ranks.broadcast(read_errors(path, option.nodes) if processes.first else None)
        if known is not None:
            return known
        values = self.errors(bank, option.solver, option.nodes, count)
        if processes.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"nodes": option.nodes, "errors": values}))
        return values


def read_errors(path: Path, nodes: Tensor) -> Tensor | None:
    """The errors in a file; None where there are none, or of other nodes."""
    if not path.is_file():
        return None
    with suppress(OSError, SafetensorError):  # a damaged file is written again
        known = load_file(path)
        return known["errors"] if torch.equal(known["nodes"], nodes) else None
    return None


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values."""
    return (values.std() / len(values) ** 0.5).item()


def mean_error(values: Tensor) -> float:
    """The mean, or infinity for a solver that left the finite numbers."""
    mean = values.mean().item()
    return mean if math.isfinite(mean) else math.inf
