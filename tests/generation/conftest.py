"""A predictor for the exact Gaussian backbone, which samples in milliseconds."""

from pathlib import Path

import pytest

from solvers import Predictor, SolverTable, Spec, logsnr, save_predictor


@pytest.fixture
def table(tmp_path) -> Path:
    """Three intervals, two points, guidance 2: serial depth 6, 9 evaluations."""
    nodes = {"num_steps": 4, "schedule_type": "logsnr", "sigma_min": 0.05, "sigma_max": 10.0}
    spec = Spec(backend="gaussian", num_points=2, guidance_rate=2.0, **nodes)
    path = tmp_path / "table.pkl"
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, logsnr(4, 0.05, 10.0)), path)
    return path
