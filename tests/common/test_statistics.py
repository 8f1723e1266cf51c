"""The statistics against closed forms and SciPy's."""

import numpy as np
import pytest
from scipy import stats

from common.statistics import (
    BOOTSTRAP,
    STUDENT,
    bootstrap_means,
    by_prompt,
    clustered_halfwidth,
    estimate,
    sign_test,
    student_t_975,
)

VALUES = np.random.default_rng(3).normal(2, 5, 60).tolist()
PROMPTS = [f"prompt {i}" for i in range(60)]


def test_the_bootstrap_of_zeros_and_ones_is_binomial():
    n, ones = 50, 20
    means = bootstrap_means(*by_prompt([1.0] * ones + [0.0] * (n - ones), PROMPTS[:n]), resamples=40_000)
    exact = stats.binom(n, ones / n)
    for k in range(10, 31):
        assert (means * n < k + 0.5).mean() == pytest.approx(
            exact.cdf(k), abs=0.012
        )  # 4 standard errors of a share
    low, high = estimate([1.0] * ones + [0.0] * (n - ones), PROMPTS[:n]).interval
    assert [low * n, high * n] == [exact.ppf(0.025), exact.ppf(0.975)]


def test_the_bootstrap_has_the_closed_variance():
    means = bootstrap_means(*by_prompt(VALUES, PROMPTS))
    assert means.mean() == pytest.approx(np.mean(VALUES), abs=4 * np.std(VALUES) / 60**0.5 / 100)
    assert means.var() == pytest.approx(np.var(VALUES) / 60, rel=0.06)  # 4 standard errors of a variance


def test_one_image_a_prompt_has_the_usual_standard_error():
    result = estimate(VALUES, PROMPTS)
    assert result.mean == pytest.approx(np.mean(VALUES))
    assert result.standard_error == pytest.approx(stats.sem(VALUES))
    assert (result.count, result.prompts) == (60, 60)


def test_images_of_a_prompt_add_no_prompts():
    """The same images three times over: nothing is known any better."""
    once, thrice = estimate(VALUES, PROMPTS), estimate(VALUES * 3, PROMPTS * 3)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    assert thrice.interval == pytest.approx(once.interval)
    assert (thrice.count, thrice.prompts) == (180, 60)


def test_prompts_of_unequal_numbers_are_weighted_by_their_images():
    result = estimate([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert result.mean == 0.25
    assert result.standard_error == pytest.approx((2 * (0.75**2 + 0.75**2)) ** 0.5 / 4)
    half = stats.t.ppf(0.975, 1) * result.standard_error
    assert result.interval == pytest.approx([0.25 - half, 0.25 + half], rel=1e-4)


@pytest.mark.parametrize("prompts", [2, 5, 9])
def test_few_prompts_have_the_interval_of_students_t(prompts):
    result = estimate(VALUES[:prompts], PROMPTS[:prompts])
    exact = stats.t.interval(0.95, prompts - 1, np.mean(VALUES[:prompts]), stats.sem(VALUES[:prompts]))
    assert result.interval == pytest.approx(list(exact), rel=1e-3)
    assert result.method == STUDENT
    assert estimate(VALUES[:10], PROMPTS[:10]).method == BOOTSTRAP


def test_quantiles_of_students_t():
    for degrees in range(1, 300):
        assert student_t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=3e-4)
    with pytest.raises(ValueError, match="0 degrees"):
        student_t_975(0)


@pytest.mark.parametrize("prompts", [3, 5, 8])
def test_95_percent_intervals_cover_the_mean_in_95_percent(prompts):
    """4 images a prompt that share half of their variance; the bootstrap's intervals cover less."""
    rng, draws, names = np.random.default_rng(prompts), 3000, np.repeat(PROMPTS[:prompts], 4).tolist()
    drawn = rng.normal(size=(draws, prompts, 1)) + rng.normal(size=(draws, prompts, 4))
    samples = drawn.reshape(draws, -1)

    def coverage(intervals) -> float:
        return np.mean([low <= 0 <= high for low, high in intervals])

    of_bootstrap = (
        np.quantile(bootstrap_means(*by_prompt(s, names), resamples=500), (0.025, 0.975))
        for s in samples[:1000]
    )
    assert 0.93 <= coverage(estimate(s, names).interval for s in samples) <= 0.97
    assert coverage(of_bootstrap) < 0.91


def test_one_prompt_has_no_interval():
    result = estimate([1.0, 2.0], ["a", "a"])
    assert (result.mean, result.standard_error, result.interval, result.method) == (1.5, None, None, None)


def test_the_sign_test_is_scipys():
    pairs = [(wins, losses) for wins in range(12) for losses in range(12) if wins + losses] + [
        (480, 530),
        (3000, 2800),
    ]
    for wins, losses in pairs:
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)
    assert sign_test(0, 0) == 1


@pytest.mark.parametrize("prompts, seeds", [(2, 4), (5, 8), (32, 8)])
def test_95_of_100_half_widths_hold_the_true_mean(prompts, seeds):
    generator = np.random.default_rng(0)
    names = [str(g) for g in range(prompts)] * seeds
    held = 0
    for _ in range(4000):
        values = np.tile(generator.normal(0.3, 1.0, prompts), seeds) + generator.normal(
            0, 1.0, prompts * seeds
        )
        held += abs(values.mean() - 0.3) <= clustered_halfwidth(values, names)
    assert 0.94 < held / 4000 < 0.96
    assert clustered_halfwidth([1.0, 2.0], ["a", "a"]) is None
