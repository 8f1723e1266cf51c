"""Rollouts where memory ends: network calls are halved, and training and held-out images each keep their own
size.
"""

import torch

from backends import load_backend
from solvers import SolverTable, Spec
from training.config import load_config
from training.ppo.config import RDPOConfig
from training.ppo.rollout import Scorer
from training.ppo.setup import find_start, prepare
from training.processes import Processes
from training.run_folder import RunFolder

from ..distill.conftest import ALONE, Line
from ..distill.test_gradients import Small
from ..runs import RDPO
from .conftest import NODES, Quadratic


def test_rollouts_are_halved_where_memory_ends():
    r = torch.linspace(0.1, 0.9, 12, dtype=torch.float64).view(6, 1, 2)
    table = SolverTable(r, torch.full_like(r, 0.5))
    small = Small(5, 99)
    scorers = [Scorer(backend, NODES, 1.0, False, 1, [Quadratic()]) for backend in (Line(), small)]
    prompts, seeds = [f"prompt {i}" for i in range(6)], list(range(6))
    whole, halved = (score(table, prompts, seeds) for score in scorers)
    assert torch.equal(whole, halved)
    failures = small.failures
    assert failures > 0
    scorers[1](table, prompts, seeds)
    assert small.failures == failures  # it remembers


def test_training_and_heldout_calls_are_halved_apart(tmp_path):
    config = load_config(RDPOConfig, RDPO.write_config(tmp_path))
    backend = load_backend(Spec(backend="gaussian"), "cpu")
    trainer = prepare(config, find_start(config), backend, RunFolder(tmp_path), Processes(ALONE))
    assert trainer.train.points is not trainer.heldout.score.points
