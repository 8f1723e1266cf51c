"""Reward backpropagation: its gradient by finite differences, and runs of it."""

import pytest
import torch

from rewards import load_reward
from solvers import compile_tableau
from solvers.baselines import BASELINES
from training.ppo.backprop import BackpropTrainer
from training.ppo.gaussian import GaussianPolicy
from training.ppo.rollout import HeldOut, RolloutPlan

from ..runs import RDPO
from .conftest import NODES, Never, reward_of, trainer_of
from .test_anchor import save_start

BACKPROP = ("ppo.estimator=backprop", "ppo.steps=4", "evaluation.interval=2")


def backprop_trainer(folder, policy=None, **ppo) -> BackpropTrainer:
    other = trainer_of(folder, estimator="backprop", **ppo)
    return BackpropTrainer(other.config, policy or other.policy, other.problem, other.run, other.processes)


@pytest.mark.parametrize("kind", ["table", "gaussian"])
def test_the_gradient_is_that_of_finite_differences(tmp_path, kind):
    start = compile_tableau(BASELINES["heun"], NODES)
    policy = GaussianPolicy(start, std=0.2) if kind == "gaussian" else None
    trainer = backprop_trainer(tmp_path, policy)
    (parameter,) = trainer.policy.parameters()
    with torch.no_grad():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    plan = RolloutPlan(["prompt 0"] * 16, list(range(16)))
    rows = trainer.gradient(plan, slice(4, 16))
    assert rows.shape == (12, parameter.numel() + 1)
    flat, differences = parameter.data.view(-1), []
    for i in range(len(flat)):
        values = []
        for step in (1e-3, -1e-3):
            flat[i] += step
            values.append(HeldOut(trainer.train, plan.prompts[4:], plan.seeds[4:]).scores(
                trainer.policy.mean(), trainer.processes).sum())  # fmt: skip
            flat[i] -= step
        differences.append((values[0] - values[1]) / 2e-3)
    expected = torch.stack(differences)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(
        rows[:, :-1].sum(0), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
    )


def test_it_finds_the_best_position_of_a_one_point_table(tmp_path):
    trainer = backprop_trainer(tmp_path, steps=40, learning_rate=0.1)
    trainer.fit(40, Never(), lambda record, seconds: None)
    r = trainer.policy.mean().r.item()
    best = max((k / 40 for k in range(1, 40)), key=reward_of)
    assert abs(r - best) < 0.1
    assert reward_of(r) > reward_of(0.5) + 0.01


@pytest.mark.parametrize(("kind", "more"), [("epd", ()), ("tableau", ("ppo.policy=gaussian",))])
def test_a_run_in_parts_ends_in_the_bytes_of_the_whole(tmp_path, kind, more):
    save_start(tmp_path, kind)
    whole = RDPO.start(tmp_path, "whole", *BACKPROP, *more)
    parts = RDPO.start(tmp_path, "parts", *BACKPROP, *more, more=("--max-steps", 3))
    RDPO.resume(parts)
    assert RDPO.outcome(parts) == RDPO.outcome(whole)
    steps = [r for r in whole.records() if "grad_norm" in r]
    assert len(steps) == 4
    assert all(r["grad_norm"] > 0 for r in steps)


def test_images_of_a_step_have_prompts_and_noise_of_their_own(tmp_path):
    trainer = backprop_trainer(tmp_path)
    seen = []
    trainer.gradient = lambda plan, rows: (
        seen.extend(plan.seeds[rows])
        or torch.zeros(len(plan.seeds[rows]), sum(p.numel() for p in trainer.policy.parameters()) + 1)
    )
    trainer.learn()
    assert len(set(seen)) == trainer.config.ppo.rollout_batch_size


def test_rewards_have_the_gradient_of_finite_differences():
    reward = load_reward("digits", {}, "cpu")
    prompts = ["a bold red handwritten three", "a thin green seven"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    reward(images, prompts)  # keeps the prompts' embeddings, from inference mode
    torch.testing.assert_close(reward.with_gradient(images, prompts), reward(images, prompts))
    asked = images.clone().requires_grad_()
    gradient = torch.autograd.grad(reward.with_gradient(asked, prompts).sum(), asked)[0]
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    direction = direction / direction.norm()
    ends = [reward(images + step * direction, prompts).double().sum() for step in (0.02, -0.02)]
    assert (gradient * direction).sum().item() == pytest.approx((ends[0] - ends[1]).item() / 0.04, rel=0.05)


def test_a_sum_of_rewards_has_the_sum_of_their_gradients():
    multi = load_reward("multi", {"weights": {"digits": 2.0}, "constants": {"digits": [-1.0, 1.0]}}, "cpu")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    prompts = ["a bold red handwritten three", "a thin green seven"]
    score = multi.with_gradient(images, prompts)
    torch.testing.assert_close(score.detach(), multi(images.detach(), prompts))
    own = load_reward("digits", {}, "cpu")
    expected = torch.autograd.grad(own.with_gradient(images, prompts).sum(), images)[0]
    torch.testing.assert_close(torch.autograd.grad(score.sum(), images)[0], expected / 2)


def test_a_reward_that_is_not_finite_ends_the_run_in_a_line(tmp_path):
    trainer = backprop_trainer(tmp_path)
    trainer.problem.train.rewards[0].broken = True
    with pytest.raises(Exception, match="a reward at step 1, or its gradient, is not finite"):
        trainer.learn()
