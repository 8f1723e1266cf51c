"""A quadratic reward on a Gaussian-mixture ODE, with one number to learn."""

import torch

from rewards import Reward
from solvers import SolverTable, Spec, polynomial
from training.ppo.config import EvaluationConfig, LoggingConfig, PPOConfig, RDPOConfig, RunConfig
from training.ppo.policy import PolicySettings, make_policy
from training.ppo.rollout import HeldOut, Problem, Scorer
from training.ppo.trainer import RDPOTrainer
from training.processes import Processes
from training.run_folder import RunFolder

from ..distill.conftest import ALONE, Line

NODES = polynomial(2, 0.2, 3.0)
PROMPTS = [f"prompt {i}" for i in range(12)]


class Quadratic(Reward):
    """-(|x| - 1)^2 of the one latent, and a prompt's own offset: difficulty that no table can change."""

    name, version, device = "quadratic", "1", torch.device("cpu")

    def __init__(self, broken=False):
        self.broken = broken

    def score(self, images, prompts):
        x = (images[:, 0, 0, 0].double() - 0.5) * 4
        offset = torch.tensor([0.2 * int(p.split()[1]) for p in prompts])
        return (-((x.abs() - 1) ** 2) - offset) * (float("nan") if self.broken else 1)


def trainer_of(tmp_path, seed=0, broken=False, **ppo) -> RDPOTrainer:
    settings = {
        "rollout_batch_size": 64,
        "rloo_k": 8,
        "rollout_chunk": 64,
        "minibatch_size": 64,
        "steps": 80,
        "learning_rate": 0.1,
        "kl_coef": 0.0,
        "dirichlet_concentration": 20.0,
        "max_log_change": 3.0,
    }
    config = RDPOConfig(
        run=RunConfig(seed=seed),
        ppo=PPOConfig(**settings | ppo),
        evaluation=EvaluationConfig(interval=40, images=64, rewards=[]),
        logging=LoggingConfig(save_interval=1000),
    )
    config.reward.type = "quadratic"
    p = config.ppo
    settings = PolicySettings(p.dirichlet_concentration, limit=p.max_log_change, residual=p.policy, seed=seed)
    policy = make_policy(one_point(0.5), settings)
    score = Scorer(Line(), NODES, 1.0, False, 1, [Quadratic(broken)])
    run = RunFolder(tmp_path)
    for folder in (run.checkpoints, run.metrics.parent):
        folder.mkdir(parents=True, exist_ok=True)
    heldout = HeldOut(score, ["prompt 0"] * 64, list(range(64)))
    problem = Problem(score, PROMPTS, heldout, Spec(), {"parent": "equal points"}, from_start=True)
    return RDPOTrainer(config, policy, problem, run, Processes(ALONE))


def one_point(r: float) -> SolverTable:
    """A table of one interval and one point."""
    return SolverTable(torch.tensor([[r]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))


class Never:
    def any_rank(self):
        return False


def reward_of(r: float, n: int = 512) -> float:
    """The expected reward of a position, over many seeds."""
    score = Scorer(Line(), NODES, 1.0, False, 1, [Quadratic()])
    heldout = HeldOut(score, ["prompt 0"] * n, list(range(10**6, 10**6 + n)), n)
    return heldout.scores(one_point(r), Processes(ALONE)).mean().item()
