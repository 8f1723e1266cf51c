"""Learned solvers against the best baseline of the same cost, paired by prompt and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .comparison import Run, compare
from .naming import is_learned, solver_name
from .tables import number

COSTS = {"depth": "depth", "evaluations": "NFE"}


@dataclass(frozen=True)
class Verdict:
    """A learned run, the best baseline at an equal cost by one metric, and their paired difference."""

    learned: Run
    baseline: Run
    metric: str
    costs: tuple[str, ...]
    """The costs of COSTS that are equal: one of them, or both."""
    row: dict
    """The comparison, as `compare` returns it."""

    @property
    def interval(self) -> list[float] | None:
        """The 95 % interval of the mean difference."""
        return self.row["difference"]["interval"]

    @property
    def outcome(self) -> str:
        """Whether the interval of the difference lies above 0, below 0, or holds it."""
        if self.interval is None:
            return "unclear"
        return "higher" if self.interval[0] > 0 else "lower" if self.interval[1] < 0 else "unclear"

    @property
    def equal(self) -> str:
        """What is equal, in words."""
        return f"equal {' and '.join(COSTS[cost] for cost in self.costs)}"


def mean_of(run: Run, metric: str) -> float:
    """The mean score of a run."""
    return run.scores[metric].summary["mean"]


def best_baseline(learned: Run, runs: Sequence[Run], metric: str, cost: str) -> Run | None:
    """The baseline of the highest mean among those of the learned run's cost and guidance."""
    own = learned.settings
    equal = [
        run
        for run in runs
        if not is_learned(run) and all(run.settings.get(key) == own.get(key) for key in (cost, "guidance"))
    ]
    return max(equal, key=lambda run: mean_of(run, metric), default=None)


def verdicts(learned: Run, runs: Sequence[Run], metric: str) -> list[Verdict]:
    """A learned run against the best baseline at equal serial depth, and at equal NFE, among runs of its
    family.
    """
    if "depth" not in learned.settings:
        return []
    if learned.settings["depth"] == learned.settings["evaluations"]:
        groups: list[tuple[str, ...]] = [tuple(COSTS)]
    else:
        groups = [(cost,) for cost in COSTS]
    best = [(costs, best_baseline(learned, runs, metric, costs[0])) for costs in groups]
    return [
        Verdict(learned, baseline, metric, costs, compare(baseline, learned, metric))
        for costs, baseline in best
        if baseline is not None
    ]


def verdict_lines(runs: Sequence[Run], predictors: Mapping[str, Path]) -> list[str]:
    """A line for each metric, learned run and equal cost, of runs of one family."""
    return [
        verdict_line(verdict, predictors)
        for metric in runs[0].scores
        for run in runs
        if is_learned(run)
        for verdict in verdicts(run, runs, metric)
    ]


def verdict_line(verdict: Verdict, predictors: Mapping[str, Path]) -> str:
    """Such as "digits at depth 4: EPD distilled 0.715, best baseline Euler 0.649 (+0.066 [...])", the
    difference paired by prompt and seed.
    """
    learned, baseline, metric = verdict.learned, verdict.baseline, verdict.metric
    equal = " and ".join(f"{COSTS[cost]} {learned.settings[cost]}" for cost in verdict.costs)
    difference = number(verdict.row["difference"]["mean"], signed=True, digits=2)
    if verdict.interval is not None:
        low, high = (number(value, signed=True, digits=2) for value in verdict.interval)
        difference += f" [{low}, {high}]"
    own, other = (number(mean_of(run, metric), digits=3) for run in (learned, baseline))
    trained = learned.scores[metric].summary["trained_on"]
    mark = {True: " (trained on it)", None: " (trained on it?)", False: ""}[trained]
    return (
        f"{metric} at {equal}: {solver_name(learned, predictors)}{mark} {own}, best baseline"
        f" {solver_name(baseline, predictors)} {other} ({difference})"
    )
