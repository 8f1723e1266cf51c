"""What a solver was trained on, from its predictor file."""

import hashlib
from pathlib import Path

import pytest

from evaluation.provenance import find_predictors, training_of
from rewards import load_reward
from solvers import Predictor, SolverTable, Spec, save_predictor


def save(path: Path, **provenance) -> str:
    """A predictor with a provenance; its hash."""
    save_predictor(Predictor(SolverTable.uniform(2, 2), Spec(), None, provenance), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_reward_and_its_heads(tmp_path):
    config = {"weights": {"digits": 1}, "constants": {"digits": [0, 1]}}
    plain = save(tmp_path / "plain.pkl", kind="rdpo", reward=load_reward("digits", {}, "cpu").protocol())
    summed = save(tmp_path / "sum.pkl", kind="rdpo", reward=load_reward("multi", config, "cpu").protocol())
    files = find_predictors([tmp_path])
    assert training_of({"predictor": plain}, files).rewards == {"digits"}
    training = training_of({"predictor": summed}, files)
    assert training.rewards == {"multi", "digits"}
    assert [training.covers(parts) for parts in (["digits"], ["multi", "hps"], ["judge"])] == [
        True,
        True,
        False,
    ]


def test_those_before_it_count_too(tmp_path):
    parent = save(tmp_path / "parent.pkl", kind="distilled", trained_on_the_judge=True)
    child = save(
        tmp_path / "child.pkl",
        kind="rdpo",
        reward={"name": "digits"},
        parent=f"parent.pkl sha256:{parent[:16]}",
    )
    assert training_of({"predictor": child}, find_predictors([tmp_path])).rewards == {"digits", "judge"}
    (tmp_path / "parent.pkl").unlink()
    training = training_of({"predictor": child}, find_predictors([tmp_path]))
    assert [training.covers([name]) for name in ("digits", "judge")] == [True, None]


@pytest.mark.parametrize(
    ("settings", "verdict"), [({"predictor": None}, False), ({"predictor": "0" * 64}, None), ({}, None)]
)
def test_a_baseline_was_trained_on_nothing_and_the_unknown_is_unknown(settings, verdict):
    assert training_of(settings, {}).covers(["digits"]) is verdict


def test_a_published_file_does_not_say(tmp_path):
    sha = save(tmp_path / "published.pkl", format="published")
    assert training_of({"predictor": sha}, find_predictors([tmp_path])).covers(["hps"]) is None
