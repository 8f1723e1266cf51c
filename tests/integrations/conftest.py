"""Makes the tiny pipelines importable, and the learned tables of a name wherever they lie under exps."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "backends")]

import pytest  # noqa: E402
import torch  # noqa: E402
from reference import table_file  # noqa: E402
from tiny import CPU  # noqa: E402

from backends import load_backend  # noqa: E402
from solvers import Spec, load_predictor  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    """The embedded backbones by family."""
    families = {"ldm": {}, "sd3": {"family": "sd3"}, "flux": {"family": "flux"}}
    return {
        name: load_backend(Spec(backend="digits", backend_config=options), CPU)
        for name, options in families.items()
    }


@pytest.fixture(scope="session")
def learned():
    """A learned predictor of a name such as epd-g7.5-d4, and its file."""
    return lambda name: (load_predictor(table_file(name)), table_file(name))
