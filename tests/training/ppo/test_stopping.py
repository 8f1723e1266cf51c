"""RDPO that is asked to stop in the middle of a step or an evaluation: it ends between chunks and goes on to
the same bytes.
"""

import json
import time

import pytest

from training.ppo import launch
from training.ppo.rollout import Scorer
from training.run_folder import CheckpointTimer

from ..stops import StopAtCheck, invoke, sigterm_under_torchrun
from .test_launch import CPU, arguments_of, outcome, run_of, start, write_config

# 8 images in chunks of 4 are two looks a step and one after it; the 6 held-out images, 4 a batch, two an
# evaluation
EVALUATION, STEP = 2, 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the small configuration that nothing stopped; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return start(folder, write_config(folder), "whole")


@pytest.mark.parametrize(
    "look, stopped, evaluated, chunks",
    [
        (2, 0, -1, 1),  # in the first evaluation
        (EVALUATION + 2, 0, 0, EVALUATION + 1),  # in the first step
        (EVALUATION + STEP + 2 + EVALUATION, 2, 0, EVALUATION + 2 + 2 + 1),  # in the evaluation of step 2
        (2 * EVALUATION + 2 * STEP + 2, 2, 2, 2 * EVALUATION + 2 * 2 + 1),  # in step 3
    ],
)
def test_a_stop_in_mid_step_abandons_it_and_the_run_goes_on_to_the_same_end(
    tmp_path, monkeypatch, whole, look, stopped, evaluated, chunks
):
    rollouts, honest = [], Scorer.__call__
    monkeypatch.setattr(
        Scorer, "__call__", lambda self, *arguments: rollouts.append(0) or honest(self, *arguments)
    )
    with monkeypatch.context() as patch:
        StopAtCheck(patch, look)
        out = invoke(launch.main, *arguments_of(write_config(tmp_path), tmp_path, "cut"))
    cut = run_of(tmp_path, "cut")
    assert f"stopped at step {stopped} as asked; go on with --resume" in out
    assert len(rollouts) == chunks
    state = cut.load_checkpoint()
    assert (state["step"], state["evaluated"]) == (stopped, evaluated)
    invoke(launch.main, "--resume", cut.path, *CPU)
    assert outcome(cut) == outcome(whole)


def test_a_run_without_any_evaluation_has_nothing_to_export(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        StopAtCheck(patch, 1)
        out = invoke(launch.main, *arguments_of(write_config(tmp_path), tmp_path, "cut"))
    assert "wrote" not in out
    assert list(run_of(tmp_path, "cut").export.iterdir()) == []


def test_a_crash_after_an_evaluation_that_no_checkpoint_knows_of_makes_it_once(tmp_path, monkeypatch, whole):
    """A checkpoint by time, between a step and its evaluation, is all that is left."""
    often = ("--override", "logging.save_interval=1000", "--override", "logging.save_minutes=10")
    monkeypatch.setattr(CheckpointTimer, "due", lambda timer: True)
    run = start(tmp_path, write_config(tmp_path), "cut", "--max-steps", 4, *often)
    monkeypatch.undo()
    state = run.load_checkpoint()
    run.save_checkpoint(4, state | {"evaluated": 2, "best": state["best"] | {"stale": 0}})
    assert run.records()[-1]["step"] == 4
    assert "table" in run.records()[-1]
    invoke(launch.main, "--resume", run.path, *CPU)
    records = [json.dumps(r) for r in run.records()]
    assert len(records) == len(set(records)) == len(whole.records())


@pytest.mark.parametrize("minutes, written", [("1e-9", 3), ("null", 0)])
def test_checkpoints_by_time_change_nothing(tmp_path, monkeypatch, whole, minutes, written):
    saved, honest = [], CheckpointTimer.restart
    monkeypatch.setattr(CheckpointTimer, "restart", lambda timer: saved.append(0) or honest(timer))
    more = ("--override", f"logging.save_minutes={minutes}", "--override", "logging.save_interval=1000")
    run = start(tmp_path, write_config(tmp_path), "often", *more)
    assert outcome(run) == outcome(whole)
    assert len(list(run.checkpoints.iterdir())) == max(2, written)  # without: at step 0 and at the end
    assert len(saved) == (2 if written == 0 else 2 + 2 * 6)  # after each step and after its evaluation too


def test_the_time_between_checkpoints(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timer, off = CheckpointTimer(0.5), CheckpointTimer(None)
    now[0] += 29
    assert not timer.due()
    now[0] += 1
    assert timer.due()
    timer.restart()
    assert not timer.due()
    now[0] += 1e9
    assert not off.due()


def test_sigterm_under_torchrun_ends_before_the_step_would(tmp_path):
    """A step takes 40 s and torchrun kills 30 s after SIGTERM; the run ends within a chunk, and its
    checkpoint is the step before.
    """
    more = [
        part
        for text in ("ppo.rollout_batch_size=40", "ppo.rollout_chunk=1", "ppo.steps=2")
        for part in ("--override", text)
    ]
    config = write_config(tmp_path)
    whole = start(tmp_path, config, "whole", *more)
    arguments = arguments_of(config, tmp_path, "cut", *more)
    output, seconds = sigterm_under_torchrun(
        tmp_path, "training.ppo.launch", "training.ppo.rollout.Scorer.__call__", arguments, 1 + 20, 2.0
    )
    assert "stopped at step 1 as asked; go on with --resume" in output
    assert seconds < 20
    cut = run_of(tmp_path, "cut")
    assert cut.load_checkpoint()["step"] == 1
    invoke(launch.main, "--resume", cut.path, *CPU)
    assert outcome(cut) == outcome(whole)
