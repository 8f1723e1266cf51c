"""Distillation that is asked to stop in the middle of a step or an evaluation: it ends between chunks and
goes on to the same bytes.
"""

import signal
import time

import pytest

from common.distributed import never
from training.distill import launch
from training.distill.gradients import ChunkGradient
from training.run_folder import CheckpointTimer

from ... import forked
from ..stops import StopAtCheck, invoke
from .test_launch import CPU, arguments_of, outcome, run_of, start, write_config

# looks for a stop: 3 shards, 1 batch of the teacher's check and 8 of baselines, then 2 an evaluation, 4
# chunks a step and 1 after it
READY, EVALUATION, CHUNKS = 12, 2, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the small configuration that nothing stopped; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return start(folder, write_config(folder), "whole")


def went_on(cut, stopped: int) -> dict[str, bytes]:
    """What comes out of a run that was stopped, once it has gone on to its end."""
    for path in cut.export.glob(f"*step{stopped:06d}.pkl"):
        path.unlink()  # the last table when it stopped
    invoke(launch.main, "--resume", cut.path, "--exps", cut.path.parent, *CPU)
    return outcome(cut)


@pytest.mark.parametrize(
    "look, stopped, evaluated, chunks",
    [
        (READY + 2, 0, -1, 0),  # in the first evaluation
        (READY + EVALUATION + 3, 0, 0, 2),  # in the first step
        (READY + EVALUATION + 2 * CHUNKS + 1 + 2, 2, 0, 2 * CHUNKS),  # in the evaluation of step 2
        (READY + 2 * EVALUATION + 2 * CHUNKS + 2 + 2, 2, 2, 2 * CHUNKS + 1),  # in step 3
    ],
)
def test_a_stop_in_mid_step_abandons_it_and_the_run_goes_on_to_the_same_end(
    tmp_path, monkeypatch, whole, look, stopped, evaluated, chunks
):
    done, honest = [], ChunkGradient.__call__
    monkeypatch.setattr(
        ChunkGradient, "__call__", lambda self, indices: done.append(0) or honest(self, indices)
    )
    with monkeypatch.context() as patch:
        StopAtCheck(patch, look)
        out = invoke(launch.main, *arguments_of(write_config(tmp_path), tmp_path / "exps", "cut"))
    cut = run_of(tmp_path / "exps", "cut")
    assert f"stopped at step {stopped} as asked; go on with --resume" in out
    assert len(done) == chunks
    state = cut.load_checkpoint()
    assert (state["step"], state["evaluated"]) == (stopped, evaluated)
    assert went_on(cut, stopped) == outcome(whole)


@pytest.mark.parametrize("look, shards", [(2, 1), (6, 3)])
def test_a_stop_before_the_first_step_ends_after_the_shard_in_hand(
    tmp_path, monkeypatch, whole, look, shards
):
    config = write_config(tmp_path)
    with monkeypatch.context() as patch:
        StopAtCheck(patch, look)
        out = invoke(launch.main, *arguments_of(config, tmp_path / "exps", "cut"))
    assert (
        f"stopped before step 1 as asked; what is complete in {tmp_path / 'banks'} is kept: run the same"
        " command again" in out
    )
    assert len(list((tmp_path / "banks").rglob("*.safetensors"))) == shards
    assert outcome(start(tmp_path, config, "again")) == outcome(whole)


@pytest.mark.parametrize("minutes, written", [("1e-9", 2 + 2 * 6), ("null", 2)])
def test_checkpoints_by_time_change_nothing(tmp_path, monkeypatch, whole, minutes, written):
    saved, honest = [], CheckpointTimer.restart
    monkeypatch.setattr(CheckpointTimer, "restart", lambda timer: saved.append(0) or honest(timer))
    more = (
        "--override",
        f"train.checkpoint_minutes={minutes}",
        "--override",
        "train.checkpoint_interval=1000",
    )
    assert outcome(start(tmp_path, write_config(tmp_path), "often", *more)) == outcome(whole)
    assert len(saved) == written


def slow_chunks(log, arguments) -> None:
    """The command line where all chunks of a rank after the first step's two take a second."""
    import sys

    done, honest = [], ChunkGradient.__call__

    def slow(self, indices):
        done.append(0)
        if len(done) > 2:
            with open(log, "a") as file:
                file.write("chunk\n")
            time.sleep(1)
        return honest(self, indices)

    ChunkGradient.__call__ = slow
    sys.argv = ["training.distill.launch", *arguments]
    launch.main(standalone_mode=False)


def test_one_of_two_processes_is_stopped_in_mid_step(tmp_path, whole):
    """SIGTERM to one rank ends both, before a step that takes 2 s of each."""
    log = tmp_path / "chunks"
    arguments = arguments_of(write_config(tmp_path), tmp_path / "exps", "cut")
    process = forked.Forked(slow_chunks, log, arguments, ranks=2)
    done = process.signal_when(
        lambda: log.exists() and log.read_text().count("chunk") >= 1, signal.SIGTERM, alone=True
    )
    assert done.returncode == 0, done.stderr
    assert "stopped at step 1 as asked" in done.stdout
    assert log.read_text().count("chunk") <= 2
    assert went_on(run_of(tmp_path / "exps", "cut"), 1) == outcome(whole)


def test_there_is_no_stop_without_a_request():
    assert not never()
