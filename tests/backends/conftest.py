"""Makes `tiny` importable however pytest imports the tests, and the backbones that they share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from tiny import CPU, load_tiny, save_tiny

from backends import load_backend
from solvers import Spec

torch.set_num_threads(1)  # the networks are so small that threads only wait for each other


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A Stable Diffusion 1.5 folder with random weights."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load_tiny(tiny_folder)


@pytest.fixture(scope="session")
def digits():
    return load_backend(Spec(backend="digits"), CPU)


@pytest.fixture(scope="session")
def gaussian():
    return load_backend(Spec(backend="gaussian"), CPU)
