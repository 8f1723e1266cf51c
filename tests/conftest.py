"""Shared set-up: --slow, quiet and single-threaded numerics, no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("", "solvers", "backends")]  # their helpers

torch.set_num_threads(1)  # the networks here are tiny: more threads only wait for each other


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


LONG = (  # files of long tests start first, so that no worker is left alone with one at the end
    "test_published_training.py",
    "test_own_model.py",
    "test_sample_processes.py",
    "test_stopping.py",
    "test_speed.py",
    "test_compile.py",
    "test_package.py",
)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tiny pipeline for each published backbone, of the real one's layout and size."""
    from published import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def downloads(tmp_path_factory) -> Path:
    """The published system's files, as they are downloaded."""
    from released import write_released

    folder = tmp_path_factory.mktemp("downloads")
    write_released(folder)
    return folder / "exps"


@pytest.fixture
def project(tmp_path) -> Path:
    """The project's folder after the published downloads were copied into it."""
    from published import move_in

    return move_in(tmp_path)
