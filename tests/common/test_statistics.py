"""Student's t, and intervals of means over prompts with several images each."""

import numpy as np
import pytest
from scipy.stats import t

from common.statistics import clustered_halfwidth, student_t_975


def test_the_quantiles_of_students_t():
    degrees = [*range(1, 40), 100, 1001]
    assert [student_t_975(d) for d in degrees] == pytest.approx([t.ppf(0.975, d) for d in degrees], rel=1e-10)


@pytest.mark.parametrize("prompts, seeds", [(2, 4), (5, 8), (32, 8)])
def test_95_of_100_intervals_hold_the_true_mean(prompts, seeds):
    generator = np.random.default_rng(0)
    names = [str(g) for g in range(prompts)] * seeds
    held = 0
    for _ in range(4000):
        values = np.tile(generator.normal(0.3, 1.0, prompts), seeds) + generator.normal(0, 1.0, prompts * seeds)
        held += abs(values.mean() - 0.3) <= clustered_halfwidth(values, names)
    assert 0.94 < held / 4000 < 0.96


def test_one_prompt_has_no_interval():
    assert clustered_halfwidth([1.0, 2.0], ["a", "a"]) is None
