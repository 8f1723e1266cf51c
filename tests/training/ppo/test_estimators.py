"""The four gradient estimators (noise shared or not, the group's own baseline or the published one) against
the exact gradient.
"""

from itertools import product

import pytest
import torch

from solvers import EPD, SolverTable, sample
from training.ppo.loss import BASELINES
from training.ppo.rollout import RolloutPlan, rollout_scores, stream

from ..distill.conftest import line_velocity
from .conftest import NODES, PROMPTS, Never, Quadratic, trainer_of

COMBINATIONS = list(product(("shared", "independent"), ("prompt", "mixed")))
STEPS, TRAINING_SEEDS = 400, 5


def expected_rewards(positions: torch.Tensor) -> torch.Tensor:
    """The reward of each position [P] of the one point, over the noise, by 2001 quantiles of the normal
    distribution.
    """
    levels = (torch.arange(2001, dtype=torch.float64) + 0.5) / 2001
    noise = torch.distributions.Normal(0.0, 1.0).icdf(levels) * NODES[0]
    x = noise.repeat(len(positions), 1).view(-1, 1, 1, 1)
    each = positions.repeat_interleave(len(levels)).view(-1, 1, 1)
    states = sample(EPD(SolverTable(each, torch.ones_like(each))), line_velocity_of, x, NODES)
    images = (states.float().expand(-1, 3, -1, -1) / 4 + 0.5).clamp(0, 1)
    return Quadratic().score(images, ["prompt 0"] * len(images)).view(len(positions), -1).mean(1)


def line_velocity_of(x, sigma):
    return line_velocity(x.double(), sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma)


@pytest.fixture(scope="module")
def landscape() -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and their expected rewards."""
    positions = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    return positions, torch.cat([expected_rewards(part) for part in positions.split(50)])


def exact_gradient(trainer, landscape) -> torch.Tensor:
    """The gradient of the expected reward in the policy's parameters: an integral over the one position."""
    positions, rewards = landscape
    distribution = trainer.policy()
    segments = torch.stack([positions, 1 - positions], -1)[:, None]
    density = distribution.log_prob(segments, torch.ones(len(positions), 1, 1, dtype=torch.float64)).exp()
    expected = (density * rewards).sum() / density.sum().detach()
    # the normalisation is a constant: the grid's density integrates to 1 whatever the parameters
    return torch.autograd.grad(expected, trainer.policy.residual.change)[0].flatten()


def estimate(trainer, step: int) -> torch.Tensor:
    """One step's estimate of it: mean of advantage times score function."""
    ppo, seed = trainer.config.ppo, trainer.config.run.seed
    plan = RolloutPlan.make(PROMPTS, ppo, seed, step)
    distribution = trainer.policy()
    draw = distribution.sample(ppo.rollout_batch_size, stream(seed, step, 2))
    scores = rollout_scores(
        trainer.train,
        lambda part: draw.select(part).table(),
        plan,
        ppo.rollout_chunk,
        trainer.processes,
    )
    rewards = scores[:, 0].view(-1, ppo.rloo_k)
    advantages = BASELINES[ppo.baseline](rewards).flatten()
    surrogate = (advantages * distribution.log_prob(*draw)).mean()
    return torch.autograd.grad(surrogate, trainer.policy.residual.change)[0].flatten()


def test_all_are_unbiased_and_the_groups_own_baseline_is_the_steadiest(tmp_path, landscape, capsys):
    variance = {}
    for noise, baseline in COMBINATIONS:
        trainer = trainer_of(tmp_path, group_noise=noise, baseline=baseline)
        exact = exact_gradient(trainer, landscape)
        estimates = torch.stack([estimate(trainer, step) for step in range(STEPS)])
        error = estimates.std(0) / STEPS**0.5
        assert ((estimates.mean(0) - exact).abs() < 4 * error + 1e-3 * exact.norm()).all(), (noise, baseline)
        variance[noise, baseline] = ((estimates - exact).square().sum(1).mean() / exact.square().sum()).item()
    with capsys.disabled():
        print(
            "\nvariance of the gradient over its squared norm:",
            {" ".join(k): round(v, 3) for k, v in variance.items()},
        )
    for noise in ("shared", "independent"):
        assert variance[noise, "prompt"] < 0.8 * variance[noise, "mixed"]


def steps_to_reach(trainer, landscape) -> int:
    """The first step after which the mean table has 95 % of what can be gained."""
    positions, rewards = landscape
    start = rewards[(positions - 0.5).abs().argmin()]
    enough = start + 0.95 * (rewards.max() - start)
    for step in range(1, 161):
        trainer.fit(step, Never(), lambda *record: None)
        with torch.no_grad():
            r = trainer.policy().mean().r
        if rewards[(positions - r.item()).abs().argmin()] >= enough:
            return step
    return 161


def test_all_reach_the_best_table_and_prompt_baselines_no_later(tmp_path, landscape, capsys):
    steps = {}
    for noise, baseline in COMBINATIONS:
        settings = {"group_noise": noise, "baseline": baseline, "learning_rate": 0.03, "steps": 160}
        steps[noise, baseline] = [
            steps_to_reach(trainer_of(tmp_path, seed, **settings), landscape)
            for seed in range(TRAINING_SEEDS)
        ]
    with capsys.disabled():
        print("\nsteps to 95 % of the best reward:", {" ".join(k): v for k, v in steps.items()})
    assert max(map(max, steps.values())) <= 160
    for noise in ("shared", "independent"):
        assert sum(steps[noise, "prompt"]) <= sum(steps[noise, "mixed"])
