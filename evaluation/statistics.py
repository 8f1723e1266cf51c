"""Means with intervals by prompt, and the sign test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.statistics import by_prompt, clustered_error

RESAMPLES, SEED = 10_000, 0

__all__ = ["Estimate", "bootstrap_means", "by_prompt", "clustered_error", "estimate", "sign_test"]


@dataclass(frozen=True)
class Estimate:
    """A mean over images, its standard error and its 95 % interval; these two are None where there is one prompt only."""

    mean: float
    standard_error: float | None
    interval: list[float] | None
    count: int
    prompts: int


def estimate(values: Sequence[float], prompts: Sequence[str]) -> Estimate:
    """The mean of values [n] with a standard error and a bootstrap interval that take the prompts [n] as drawn, not the images."""
    sums, counts = by_prompt(values, prompts)
    mean, found = float(sums.sum() / counts.sum()), (len(values), len(sums))
    if len(sums) == 1:
        return Estimate(mean, None, None, *found)
    low, high = np.quantile(bootstrap_means(sums, counts), (0.025, 0.975)).tolist()
    return Estimate(mean, clustered_error(sums, counts), [low, high], *found)


def bootstrap_means(sums: NDArray, counts: NDArray, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray:
    """Means [resamples] of the values of G prompts drawn with replacement (Efron 1979), always the same ones for a seed."""
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // len(sums))  # resamples at a time, for the memory
    means = []
    for first in range(0, resamples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, resamples - first), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the sign test (Dixon & Mood 1946): min(1, 2 P(X <= min(wins, losses))), X binomial with 1/2."""
    n = wins + losses
    ways, tail = 1, 0
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)
