"""The digits backbone."""

import pytest

from backends import load_backend
from solvers import Spec


@pytest.fixture(scope="session")
def digits():
    return load_backend(Spec(backend="digits"), "cpu")
