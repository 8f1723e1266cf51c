"""The held-out gain: its interval is over prompts, step 0 is measured once, and the advice of a run that
gains nothing.
"""

import json

import pytest
import torch

from solvers import SolverTable
from training.ppo.launch import summary
from training.ppo.policy import SCALES, PolicySettings, make_policy
from training.ppo.rollout import HeldOut

from .conftest import trainer_of


def moved(trainer):
    """The same trainer with a table that is not its start's."""
    with torch.no_grad():
        trainer.policy.residual.change += torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64)
    return trainer


@pytest.mark.parametrize("prompts", [4, 8])
def test_the_interval_holds_the_true_gain_where_prompts_repeat(tmp_path, monkeypatch, prompts):
    trainer = moved(trainer_of(tmp_path))
    trainer.heldout.prompts = [f"prompt {i % prompts}" for i in range(64)]
    trainer.base_scores = torch.zeros(64, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def scores(*_):
        shared = torch.randn(prompts, generator=generator, dtype=torch.float64)
        return (
            0.3 + shared.repeat(64 // prompts) + torch.randn(64, generator=generator, dtype=torch.float64)
        )[:, None]

    monkeypatch.setattr(HeldOut, "scores", scores)
    records = [trainer.evaluate() for _ in range(800)]
    held = sum(abs(r["gain_quadratic"] - 0.3) <= r["gain_quadratic_halfwidth"] for r in records)
    assert 0.93 < held / len(records) < 0.97


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
@pytest.mark.parametrize("scales", [(), SCALES])
def test_the_mean_table_is_the_start_table_at_first(kind, scales):
    generator = torch.Generator().manual_seed(0)
    r = torch.rand(3, 2, dtype=torch.float64, generator=generator).sort().values
    w = torch.rand(3, 2, dtype=torch.float64, generator=generator)
    start = SolverTable(r, w / w.sum(-1, keepdim=True), 1 + 0.1 * r, 1 - 0.1 * r)
    policy = make_policy(start, PolicySettings(37.0, learned_scales=scales, residual=kind))
    mean, expected = (policy.with_fixed_scales(d.mean()).arrays() for d in (policy(), policy.base()))
    assert mean.keys() == expected.keys() == {"r", "w", "scale_dir", "scale_time"}
    assert all(torch.equal(mean[name], expected[name]) for name in mean)


def test_step_0_is_measured_once(tmp_path, monkeypatch):
    measured, original = [], HeldOut.scores
    monkeypatch.setattr(HeldOut, "scores", lambda *arguments: measured.append(0) or original(*arguments))
    trainer = trainer_of(tmp_path)
    trainer.heldout.prompts = [f"prompt {i % 8}" for i in range(64)]
    record = trainer.evaluate()
    assert (record["gain_quadratic"], record["gain_quadratic_halfwidth"], len(measured)) == (0.0, 0.0, 1)
    moved(trainer).evaluate()
    assert len(measured) == 2
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    "ppo, from_start, advised",
    [
        (
            {"policy": "mlp", "learning_rate": 7e-5, "rollout_batch_size": 8, "minibatch_size": 4},
            False,
            (
                "set ppo.policy=table, ppo.learning_rate=0.01, ppo.dirichlet_concentration=1000,"
                " ppo.rollout_batch_size=64"
            ),
        ),
        (
            {"dirichlet_concentration": 1000.0},
            True,
            (
                "distil the start table first (training.distill.launch): its points are equally spaced, or"
                " set ppo.dirichlet_concentration=100, ppo.learning_rate=0.03"
            ),
        ),
        ({"learning_rate": 0.01}, False, "set ppo.dirichlet_concentration=1000"),
        (
            {"learning_rate": 0.01, "dirichlet_concentration": 3000.0},
            False,
            "raise ppo.steps, or check that the reward",
        ),
    ],
)
def test_advice_names_the_settings_that_gained_elsewhere(tmp_path, ppo, from_start, advised):
    trainer = trainer_of(tmp_path, **ppo)
    trainer.problem.from_start = from_start
    trainer.step = 100
    text = trainer.warning({"gain_quadratic": 0.001, "gain_quadratic_halfwidth": 0.002})
    assert text.startswith(f"no signal: after 100 steps the gain in quadratic is +0.0010 ± 0.0020; {advised}")
    assert "\n" not in text
    assert trainer.warning({"gain_quadratic": 0.003, "gain_quadratic_halfwidth": 0.002}) is None
