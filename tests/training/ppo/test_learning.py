"""RDPO where the answer is known: a quadratic reward on a Gaussian-mixture ODE, its best table known by brute
force.
"""

from dataclasses import replace

import pytest
import torch

from training.ppo.config import PPOConfig
from training.ppo.loss import adapt_kl_coef
from training.ppo.rollout import RolloutPlan
from training.ppo.trainer import Diverged

from .conftest import PROMPTS, Never, reward_of, trainer_of


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
    trainer.fit(80, Never(), lambda *record: None)
    r = trainer.policy().mean().r.item()
    start, best = reward_of(0.5), brute_force[1]
    assert reward_of(r) - start > 0.95 * (best - start)
    assert abs(r - brute_force[0]) < 0.08


def test_siblings_share_what_they_should():
    config = PPOConfig(rollout_batch_size=12, rloo_k=3, minibatch_size=4)
    plan = RolloutPlan.make(PROMPTS, config, 0, 5)
    assert plan == RolloutPlan.make(PROMPTS, config, 0, 5)
    assert plan != RolloutPlan.make(PROMPTS, config, 1, 5)
    groups = [(set(plan.prompts[i : i + 3]), set(plan.seeds[i : i + 3])) for i in range(0, 12, 3)]
    assert all(len(p) == 1 and len(s) == 1 for p, s in groups)
    assert len({next(iter(s)) for _, s in groups}) == 4
    independent = RolloutPlan.make(PROMPTS, replace(config, group_noise="independent"), 0, 5)
    assert len(set(independent.seeds)) == 12
    assert independent.prompts == plan.prompts
    assert all(
        2**31 <= seed < 2**32 for seed in independent.seeds
    )  # never a seed of the evaluation, nor one that sounds like it


def test_an_epoch_visits_every_prompt_once():
    config = PPOConfig(rollout_batch_size=8, rloo_k=2, minibatch_size=4)
    seen = [p for step in range(6) for p in RolloutPlan.make(PROMPTS, config, 0, step).prompts[::2]]
    assert sorted(seen[:12]) == sorted(PROMPTS)
    assert sorted(seen[12:]) == sorted(PROMPTS)
    assert seen[:12] != seen[12:]


def test_three_steps_that_are_not_finite_end_a_run_and_nothing_is_applied(tmp_path):
    trainer = trainer_of(tmp_path, broken=True)
    trainer.base_scores, trainer.evaluated = torch.zeros(64, 1), 0
    records: list[dict] = []
    with pytest.raises(Diverged, match=r"3 steps in a row.*prompt"):
        trainer.fit(80, Never(), lambda record, seconds: records.append(record))
    assert [r["step"] for r in records] == [1, 2]
    assert [r["step"] for r in trainer.run.records()] == [3]  # the last one is written before the end
    assert len(records[0]["prompts"]) == len(records[0]["seeds"]) == 64
    assert (trainer.policy.residual.change == 0).all()
    assert trainer.run.latest_checkpoint() == trainer.run.checkpoint(3)


def test_a_warning_when_nothing_is_learned(tmp_path, capsys):
    trainer = trainer_of(tmp_path, learning_rate=0.0, steps=4)
    trainer.intervals = replace(trainer.intervals, evaluation=2)
    trainer.config.evaluation.warn_after = 2
    trainer.fit(4, Never(), lambda *record: None)
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 2
    assert "no signal: after 2 steps" in warnings[0]


def test_kl_is_steered_to_its_target(tmp_path):
    assert adapt_kl_coef(0.1, 2.0, 1.0) == 0.2
    assert adapt_kl_coef(0.1, 0.5, 1.0) == 0.05
    assert adapt_kl_coef(0.1, 1.0, 1.0) == 0.1
    held, free = trainer_of(tmp_path, kl_target=0.05), trainer_of(tmp_path)
    for trainer in (held, free):
        trainer.fit(60, Never(), lambda *record: None)
    kls = [t.policy().kl(t.policy.base()).item() for t in (held, free)]
    assert kls[0] < 0.5 * kls[1]
