"""The form of the code: short functions with few parameters, short files, the field's words in names."""

import pytest

from .form import MAX_P90, files, function_lines, over_limits, quantile

PATHS = files([])
OVER = over_limits(PATHS)


@pytest.mark.parametrize("limit", OVER)
def test_nothing_is_over_a_limit(limit):
    assert OVER[limit] == []


def test_most_functions_are_short():
    assert quantile(function_lines(PATHS), 0.9) <= MAX_P90
