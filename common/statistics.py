"""Means over images that share prompts: standard errors clustered by prompt, and Student's t for few prompts."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def by_prompt(values: Sequence[float], prompts: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Sum and number of the values of each of G prompts: [G], [G]."""
    order = {prompt: g for g, prompt in enumerate(dict.fromkeys(prompts))}
    groups = np.array([order[prompt] for prompt in prompts])
    return np.bincount(groups, np.asarray(values, dtype=np.float64)), np.bincount(groups)


def clustered_error(sums: NDArray, counts: NDArray) -> float:
    """Standard error of a mean clustered by prompt (Liang & Zeger 1986): s / sqrt(n) where each prompt [G] has one image."""
    groups = len(sums)
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(groups / (groups - 1) * (residuals**2).sum()) / counts.sum())


def clustered_halfwidth(values: Sequence[float], prompts: Sequence[str]) -> float | None:
    """Half the 95 % interval of the mean of values [n] whose prompts [n] are drawn: t_(G - 1) standard errors of G prompts.

    None where there is one prompt only.
    """
    sums, counts = by_prompt(values, prompts)
    return student_t_975(len(sums) - 1) * clustered_error(sums, counts) if len(sums) > 1 else None


def student_t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, by bisection: 12.706 for 1 degree of freedom, 2.262 for 9, 1.960 for many."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle, degrees) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def central_probability(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)) for Student's t: a finite sum (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (j - 1) / j * cosine**2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
