"""Held-out errors of the classical solvers, each computed once for a bank and kept beside it."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from backends import SCHEDULES, Backend, BackendError
from common.distributed import Ranks, distributed_map, never
from common.files import write_atomically
from solvers import BASELINES, Solver, Spec, UserError, baseline_of, num_steps_for_depth, sample

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


def errors(
    bank: Bank,
    solver: Solver,
    nodes: Tensor,
    count: int,
    batch: int,
    ranks: Ranks,
    stop_requested: Callable[[], bool] = never,
) -> Tensor:
    """RMSE of final states to the teacher's on the first `count` pairs [count], the pairs shared out over the
    ranks.
    """

    def measure(part: slice) -> Tensor:
        with torch.inference_mode():
            condition, x, states = bank.rows(list(range(part.start, part.stop)))
            return rmse_per_image(
                sample(solver, bank.measuring.velocity(bank.backend, condition), x, nodes), states[-1]
            )

    return distributed_map(measure, count, batch, ranks, stop_requested)


class Baselines:
    """The baselines of a spec at any serial depth, each with the schedule that suits it best on the tuning
    pairs.
    """

    def __init__(
        self,
        train: Bank,
        heldout: Bank,
        spec: Spec,
        config: EvaluationConfig,
        ranks: Ranks,
        stop_requested: Callable[[], bool] = never,
    ):
        self.train, self.heldout, self.spec, self.names = train, heldout, spec, config.baselines
        self.schedules, self.tuning, self.batch, self.ranks = (
            config.schedules or SCHEDULES,
            config.tuning_pairs,
            config.batch,
            ranks,
        )
        self.stop_requested = stop_requested

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
        path = (
            bank.folder
            / "errors"
            / f"{kind}-{option.schedule}-depth{option.depth}-{count}-batch{self.batch}.safetensors"
        )
        known = None
        if self.ranks.rank == 0 and path.is_file():
            with suppress(OSError, SafetensorError):  # made again below
                known = load_file(path)
            known = (
                known["errors"] if known is not None and torch.equal(known["nodes"], option.nodes) else None
            )
        known = self.ranks.broadcast(known)  # one rank decides for all
        if known is not None:
            return known
        found = errors(bank, option.solver, option.nodes, count, self.batch, self.ranks, self.stop_requested)
        if self.ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"nodes": option.nodes, "errors": found}))
        return found


def mean_error(values: Tensor) -> float:
    """The mean, or infinity for a solver that left the finite numbers."""
    mean = values.mean().item()
    return mean if math.isfinite(mean) else math.inf
