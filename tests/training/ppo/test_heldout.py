"""The held-out gain: its interval is over prompts, step 0 is measured once, and what a run says that gains
nothing.
"""

import json

import pytest
import torch

from solvers import SolverTable
from training.ppo import trainer as module
from training.ppo.launch import summary
from training.ppo.policy import make_policy

from .conftest import trainer_of


def moved(trainer):
    """The same trainer with a table that is not its start's."""
    with torch.no_grad():
        trainer.policy.residual.change += torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64)
    return trainer


@pytest.mark.parametrize("prompts", [4, 8])
def test_the_interval_holds_the_true_gain_where_prompts_repeat(tmp_path, monkeypatch, prompts):
    trainer = moved(trainer_of(tmp_path))
    trainer.heldout_prompts = [f"prompt {i % prompts}" for i in range(64)]
    trainer.base_scores = torch.zeros(64, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def scores(*_):
        shared = torch.randn(prompts, generator=generator, dtype=torch.float64)
        return (
            0.3 + shared.repeat(64 // prompts) + torch.randn(64, generator=generator, dtype=torch.float64)
        )[:, None]

    monkeypatch.setattr(module, "evaluate_table", scores)
    found = [trainer.evaluate() for _ in range(800)]
    held = sum(abs(r["gain_quadratic"] - 0.3) <= r["gain_quadratic_halfwidth"] for r in found)
    assert 0.93 < held / len(found) < 0.97


def test_one_prompt_has_no_interval(tmp_path):
    trainer = moved(trainer_of(tmp_path))
    record = trainer.evaluate()
    assert "gain_quadratic_halfwidth" not in record
    trainer.run.log(record)
    trainer.step = trainer.config.evaluation.warn_after
    assert "the gain in quadratic is -1.0000; distil" in trainer.warning(record | {"gain_quadratic": -1.0})
    assert trainer.warning(record | {"gain_quadratic": 1e-6}) is None
    trainer.best.step = 0
    assert summary(trainer).endswith(f"quadratic {record['gain_quadratic']:+.4f}")


@pytest.mark.parametrize("kind", ["table", "mlp"])
@pytest.mark.parametrize("scales", [(False, False), (True, True)])
def test_the_mean_table_is_the_start_table_at_first(kind, scales):
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(3, 2, dtype=torch.float64, generator=generator).sort().values
    w = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    start = SolverTable(r, w / w.sum(-1, keepdim=True), 1 + 0.1 * r, 1 - 0.1 * r)
    policy = make_policy(kind, start, 37.0, 0.05, scales, 3.0, 0)
    found, expected = (policy.with_fixed_scales(d.mean()).arrays() for d in (policy(), policy.base()))
    assert found.keys() == expected.keys() == {"r", "w", "scale_dir", "scale_time"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_step_0_is_measured_once(tmp_path, monkeypatch):
    measured, honest = [], module.evaluate_table
    monkeypatch.setattr(module, "evaluate_table", lambda *arguments: measured.append(0) or honest(*arguments))
    trainer = trainer_of(tmp_path)
    trainer.heldout_prompts = [f"prompt {i % 8}" for i in range(64)]
    record = trainer.evaluate()
    assert (record["gain_quadratic"], record["gain_quadratic_halfwidth"], len(measured)) == (0.0, 0.0, 1)
    moved(trainer).evaluate()
    assert len(measured) == 2
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    "ppo, start, advised",
    [
        (
            {"policy": "mlp", "learning_rate": 7e-5, "rollout_batch_size": 8, "minibatch_size": 4},
            0.3,
            (
                "set ppo.policy=table, ppo.learning_rate=0.01, ppo.dirichlet_concentration=1000,"
                " ppo.rollout_batch_size=64"
            ),
        ),
        (
            {"dirichlet_concentration": 1000.0},
            0.5,
            (
                "distil the start table first (training.distill.launch): its points are equally spaced, or"
                " set ppo.dirichlet_concentration=100, ppo.learning_rate=0.03"
            ),
        ),
        ({"learning_rate": 0.01}, 0.3, "set ppo.dirichlet_concentration=1000"),
        (
            {"learning_rate": 0.01, "dirichlet_concentration": 3000.0},
            0.3,
            "raise ppo.steps, or check that the reward",
        ),
    ],
)
def test_advice_names_the_settings_that_gained_elsewhere(tmp_path, ppo, start, advised):
    trainer = trainer_of(tmp_path, **ppo)
    table = SolverTable(torch.tensor([[start]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    trainer.policy = make_policy("table", table, 20.0, 0.05, (False, False), 3.0, 0)
    trainer.step = 100
    said = trainer.warning({"gain_quadratic": 0.001, "gain_quadratic_halfwidth": 0.002})
    assert said.startswith(f"no signal: after 100 steps the gain in quadratic is +0.0010 ± 0.0020; {advised}")
    assert "\n" not in said
    assert trainer.warning({"gain_quadratic": 0.003, "gain_quadratic_halfwidth": 0.002}) is None
