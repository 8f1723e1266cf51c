"""RDPO where the answer is known: a quadratic reward on a Gaussian-mixture ODE, its best table found by brute force."""

from dataclasses import replace

import pytest
import torch

from rewards import Reward
from solvers import SolverTable, Spec, polynomial
from training.ppo.config import EvaluationConfig, LoggingConfig, PPOConfig, RDPOConfig, RunConfig
from training.ppo.policy import make_policy
from training.ppo.rollout import Plan, Scorer, evaluate_table
from training.ppo.trainer import Diverged, Trainer, adapted
from training.run_folder import RunFolder

from ..distill.conftest import ALONE, Line

NODES = polynomial(2, 0.2, 3.0)
PROMPTS = [f"prompt {i}" for i in range(12)]


class Quadratic(Reward):
    """-(|x| - 1)^2 of the one latent, and a prompt's own offset: difficulty that no table can change."""

    name, device = "quadratic", torch.device("cpu")

    def __init__(self, broken=False):
        self.broken = broken

    def score(self, images, prompts):
        x = (images[:, 0, 0, 0].double() - 0.5) * 4
        offset = torch.tensor([0.2 * int(p.split()[1]) for p in prompts])
        return (-((x.abs() - 1) ** 2) - offset) * (float("nan") if self.broken else 1)


def trainer_of(tmp_path, seed=0, broken=False, **ppo) -> Trainer:
    settings = {"rollout_batch_size": 64, "rloo_k": 8, "rollout_chunk": 64, "minibatch_size": 64, "steps": 80, "learning_rate": 0.1}
    settings |= {"kl_coef": 0.0, "dirichlet_concentration": 20.0, "max_log_change": 3.0}
    config = RDPOConfig(
        run=RunConfig(seed=seed),
        ppo=PPOConfig(**settings | ppo),
        evaluation=EvaluationConfig(interval=40, images=64, rewards=[]),
        logging=LoggingConfig(save_interval=1000),
    )
    config.reward.type = "quadratic"
    start = SolverTable(torch.tensor([[0.5]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    p = config.ppo
    policy = make_policy(p.policy, start, p.dirichlet_concentration, 0.05, (False, False), p.max_log_change, seed)
    score = Scorer(Line(), NODES, 1.0, False, 1, {"quadratic": Quadratic(broken)})
    run = RunFolder(tmp_path)
    for folder in (run.checkpoints, run.metrics.parent):
        folder.mkdir(parents=True, exist_ok=True)
    seeds = list(range(64))
    return Trainer(config, ALONE, run, policy, score, score, PROMPTS, ["prompt 0"] * 64, seeds, Spec(), {"parent": "equal points"})


class Never:
    def agreed(self):
        return False


def reward_of(r: float, n: int = 512) -> float:
    """The expected reward of a position, over many seeds."""
    table = SolverTable(torch.tensor([[r]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    score = Scorer(Line(), NODES, 1.0, False, 1, {"quadratic": Quadratic()})
    return evaluate_table(score, table, ["prompt 0"] * n, list(range(10**6, 10**6 + n)), n, ALONE).mean().item()


@pytest.fixture(scope="module")
def brute_force() -> tuple[float, float]:
    """The best position and its reward, and the start's is far below."""
    grid = torch.linspace(0.02, 0.98, 49).tolist()
    rewards = [reward_of(r) for r in grid]
    best = max(range(len(grid)), key=rewards.__getitem__)
    assert 0 < best < len(grid) - 1
    assert rewards[best] - reward_of(0.5) > 0.1
    return grid[best], rewards[best]


@pytest.mark.parametrize("kind", ["table", "mlp"])
def test_rdpo_finds_the_best_table(tmp_path, brute_force, kind):
    trainer = trainer_of(tmp_path, policy=kind, learning_rate=0.1 if kind == "table" else 0.001)
    trainer.fit(80, Never(), lambda *record: None, print)
    found = trainer.policy().mean().r.item()
    start, best = reward_of(0.5), brute_force[1]
    assert reward_of(found) - start > 0.95 * (best - start)
    assert abs(found - brute_force[0]) < 0.08


def gradient_of(trainer: Trainer) -> torch.Tensor:
    """The policy gradient that one step's rollout estimates."""
    trainer.config.ppo.max_grad_norm = None
    trainer.optimiser = torch.optim.SGD(trainer.policy.parameters(), lr=0.0)
    trainer.learn()
    return trainer.policy.residual.change.grad.flatten().clone()


@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_the_groups_own_baseline_makes_a_steadier_gradient_than_the_published_one(tmp_path, noise):
    """Spread of the gradient over steps, relative to its mean, which is the same for both (they are unbiased)."""
    spread = {}
    for baseline in ("prompt", "mixed"):
        trainer = trainer_of(tmp_path, group_noise=noise, baseline=baseline)
        gradients = torch.stack([gradient_of(trainer) for _ in range(60)])
        spread[baseline] = (gradients.std(0).norm() / gradients.mean(0).norm()).item()
    assert spread["prompt"] < 0.8 * spread["mixed"]


def test_siblings_share_what_they_should():
    config = PPOConfig(rollout_batch_size=12, rloo_k=3, minibatch_size=4)
    plan = Plan.make(PROMPTS, config, 0, 5)
    assert plan == Plan.make(PROMPTS, config, 0, 5)
    assert plan != Plan.make(PROMPTS, config, 1, 5)
    groups = [(set(plan.prompts[i : i + 3]), set(plan.seeds[i : i + 3])) for i in range(0, 12, 3)]
    assert all(len(p) == 1 and len(s) == 1 for p, s in groups)
    assert len({next(iter(s)) for _, s in groups}) == 4
    independent = Plan.make(PROMPTS, replace(config, group_noise="independent"), 0, 5)
    assert len(set(independent.seeds)) == 12
    assert independent.prompts == plan.prompts
    assert min(independent.seeds) >= 2**32  # never a seed of the evaluation


def test_an_epoch_visits_every_prompt_once():
    config = PPOConfig(rollout_batch_size=8, rloo_k=2, minibatch_size=4)
    seen = [p for step in range(6) for p in Plan.make(PROMPTS, config, 0, step).prompts[::2]]
    assert sorted(seen[:12]) == sorted(PROMPTS)
    assert sorted(seen[12:]) == sorted(PROMPTS)
    assert seen[:12] != seen[12:]


def test_three_steps_that_are_not_finite_end_a_run_and_nothing_is_applied(tmp_path):
    trainer = trainer_of(tmp_path, broken=True)
    trainer.base_scores = torch.zeros(64, 1)
    records: list[dict] = []
    with pytest.raises(Diverged, match=r"3 steps in a row.*prompt"):
        trainer.fit(80, Never(), lambda record, seconds: records.append(record), print)
    assert [r["step"] for r in records] == [1, 2]
    assert [r["step"] for r in trainer.run.records()] == [3]  # the last one is written before the end
    assert len(records[0]["prompts"]) == len(records[0]["seeds"]) == 64
    assert (trainer.policy.residual.change == 0).all()
    assert trainer.run.latest_checkpoint() == trainer.run.checkpoint(3)


def test_a_warning_when_nothing_is_learned(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.0, steps=4)
    trainer.config.evaluation.interval = trainer.config.evaluation.warn_after = 2
    said: list[str] = []
    trainer.fit(4, Never(), lambda *record: None, said.append)
    assert len(said) == 2
    assert "no signal: after 2 steps" in said[0]


def test_kl_is_steered_to_its_target(tmp_path):
    assert adapted(0.1, 2.0, 1.0) == 0.2
    assert adapted(0.1, 0.5, 1.0) == 0.05
    assert adapted(0.1, 1.0, 1.0) == 0.1
    held, free = trainer_of(tmp_path, kl_target=0.05), trainer_of(tmp_path)
    for trainer in (held, free):
        trainer.fit(60, Never(), lambda *record: None, print)
    kls = [t.policy().kl(t.policy.base()).item() for t in (held, free)]
    assert kls[0] < 0.5 * kls[1]
