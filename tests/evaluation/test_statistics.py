"""The statistics against closed forms and SciPy's."""

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import bootstrap_means, by_prompt, estimate, sign_test
from evaluation.tables import number, with_interval

VALUES = np.random.default_rng(3).normal(2, 5, 60).tolist()
PROMPTS = [f"prompt {i}" for i in range(60)]


def test_the_bootstrap_of_zeros_and_ones_is_binomial():
    n, ones = 50, 20
    means = bootstrap_means(*by_prompt([1.0] * ones + [0.0] * (n - ones), PROMPTS[:n]), resamples=40_000)
    exact = stats.binom(n, ones / n)
    for k in range(10, 31):
        assert (means * n < k + 0.5).mean() == pytest.approx(exact.cdf(k), abs=0.012)  # 4 standard errors of a share
    low, high = estimate([1.0] * ones + [0.0] * (n - ones), PROMPTS[:n]).interval
    assert [low * n, high * n] == [exact.ppf(0.025), exact.ppf(0.975)]


def test_the_bootstrap_has_the_closed_variance():
    means = bootstrap_means(*by_prompt(VALUES, PROMPTS))
    assert means.mean() == pytest.approx(np.mean(VALUES), abs=4 * np.std(VALUES) / 60**0.5 / 100)
    assert means.var() == pytest.approx(np.var(VALUES) / 60, rel=0.06)  # 4 standard errors of a variance


def test_one_image_a_prompt_has_the_usual_standard_error():
    found = estimate(VALUES, PROMPTS)
    assert found.mean == pytest.approx(np.mean(VALUES))
    assert found.standard_error == pytest.approx(stats.sem(VALUES))
    assert (found.count, found.prompts) == (60, 60)


def test_images_of_a_prompt_add_no_prompts():
    """The same images three times over: nothing is known any better."""
    once, thrice = estimate(VALUES, PROMPTS), estimate(VALUES * 3, PROMPTS * 3)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    assert thrice.interval == pytest.approx(once.interval)
    assert (thrice.count, thrice.prompts) == (180, 60)


def test_prompts_of_unequal_numbers_are_weighted_by_their_images():
    found = estimate([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert found.mean == 0.25
    assert found.interval == [0.0, 1.0]
    assert found.standard_error == pytest.approx((2 * (0.75**2 + 0.75**2)) ** 0.5 / 4)


def test_one_prompt_has_no_interval():
    found = estimate([1.0, 2.0], ["a", "a"])
    assert (found.mean, found.standard_error, found.interval) == (1.5, None, None)


def test_the_sign_test_is_scipys():
    pairs = [(wins, losses) for wins in range(12) for losses in range(12) if wins + losses] + [(480, 530), (3000, 2800)]
    for wins, losses in pairs:
        assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)
    assert sign_test(0, 0) == 1


def test_numbers_as_text():
    assert [number(v) for v in (0.12345, 12345.6, -3.0, 0.0, None)] == ["0.1235", "1.235e+04", "-3.000", "0.000", "–"]
    assert with_interval(1.0, [0.5, 1.25], signed=True) == "+1.000 [+0.5000, +1.250]"
    assert with_interval(1.0, None) == "1.000"
