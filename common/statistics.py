"""Means with intervals clustered by prompt, and the sign test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED = 10_000, 0
ENOUGH_PROMPTS = 10  # with fewer the bootstrap's interval is too narrow: its 95 % covers .73 with 3 prompts
BOOTSTRAP, STUDENT = "bootstrap by prompt", "t over prompts"
STUDENT_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Z_975 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A mean over images, its standard error, its 95 % interval and the method of the interval.

    The last three are None with one prompt.
    """

    mean: float
    standard_error: float | None
    interval: list[float] | None
    count: int
    prompts: int
    method: str | None = None
    """BOOTSTRAP or STUDENT."""


def estimate(values: Sequence[float], prompts: Sequence[str]) -> Estimate:
    """The mean of values [n] with a standard error and an interval that treat the prompts [n] as the sample.

    The interval is a percentile bootstrap over prompts, or Student's t with the clustered standard error
    below ENOUGH_PROMPTS.
    """
    sums, counts = by_prompt(values, prompts)
    mean, images, groups = float(sums.sum() / counts.sum()), len(values), len(sums)
    if groups == 1:
        return Estimate(mean, None, None, images, groups)
    error = clustered_error(sums, counts)
    if groups < ENOUGH_PROMPTS:
        half = student_t_975(groups - 1) * error
        return Estimate(mean, error, [mean - half, mean + half], images, groups, STUDENT)
    low, high = np.quantile(bootstrap_means(sums, counts), (0.025, 0.975)).tolist()
    return Estimate(mean, error, [low, high], images, groups, BOOTSTRAP)


def clustered_halfwidth(values: Sequence[float], prompts: Sequence[str]) -> float | None:
    """Half the 95 % interval of the mean of values [n], clustered by their prompts [n]; None for one prompt.

    It is t_(G - 1) standard errors of G prompts.
    """
    sums, counts = by_prompt(values, prompts)
    return student_t_975(len(sums) - 1) * clustered_error(sums, counts) if len(sums) > 1 else None


def student_t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: a table up to 9 degrees of freedom, then Abramowitz & Stegun
    26.7.5.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: expected 1 or more")
    if degrees <= len(STUDENT_T_975):
        return STUDENT_T_975[degrees - 1]
    z, v = Z_975, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v**k for k, term in enumerate(terms, 1))


def by_prompt(values: Sequence[float], prompts: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Sum and number of the values of each of G prompts: [G], [G]."""
    order = {prompt: g for g, prompt in enumerate(dict.fromkeys(prompts))}
    groups = np.array([order[prompt] for prompt in prompts])
    return np.bincount(groups, np.asarray(values, dtype=np.float64)), np.bincount(groups)


def clustered_error(sums: NDArray, counts: NDArray) -> float:
    """Standard error of a mean clustered by prompt (Liang & Zeger 1986), from the sums [G] and counts [G]."""
    groups = len(sums)
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / counts.sum())


def bootstrap_means(sums: NDArray, counts: NDArray, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray:
    """Means [resamples] over G prompts drawn with replacement (Efron 1979), from sums [G] and counts [G]."""
    generator = np.random.default_rng(seed)
    chunk = max(1, 2**22 // len(sums))  # resamples at a time, for the memory
    means = []
    for first in range(0, resamples, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, resamples - first), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of the sign test (Dixon & Mood 1946): min(1, 2 P(X <= min(wins, losses))).

    X is binomial with n = wins + losses and probability 1/2.
    """
    n = wins + losses
    ways, tail = 1, 0
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)
