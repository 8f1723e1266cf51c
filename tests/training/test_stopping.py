"""A run that is asked to stop in the middle of a step or an evaluation ends between chunks, and goes on to
the same bytes.
"""

import json
import signal
import subprocess
import time

import pytest

from training.distill import launch
from training.distill.gradients import ChunkGradient
from training.ppo.rollout import Scorer
from training.trainer import CheckpointTimer

from .. import forked
from .runs import CPU, DISTILL, RDPO, ROOT, StopAtCheck, invoke

# looks for a stop of the small distillation: 3 shards, 1 batch of the teacher's check and 8 of baselines,
# then 2 an evaluation, 4 chunks a step and 1 after it
READY, EVALUATION, CHUNKS = 12, 2, 4
DISTILL_STOPS = {
    "in the first evaluation": (READY + 2, 0, -1, 0),
    "in the first step": (READY + EVALUATION + 3, 0, 0, 2),
    "in the evaluation of step 2": (READY + EVALUATION + 2 * CHUNKS + 1 + 2, 2, 0, 2 * CHUNKS),
    "in step 3": (READY + 2 * EVALUATION + 2 * CHUNKS + 2 + 2, 2, 2, 2 * CHUNKS + 1),
}
# of RDPO: 8 images in chunks of 4 are two looks a step and one after it; the 6 held-out images, 4 a batch,
# two an evaluation
STEP = 3
RDPO_STOPS = {
    "in the first evaluation": (2, 0, -1, 1),
    "in the first step": (EVALUATION + 2, 0, 0, EVALUATION + 1),
    "in the evaluation of step 2": (EVALUATION + STEP + 2 + EVALUATION, 2, 0, EVALUATION + 2 + 2 + 1),
    "in step 3": (2 * EVALUATION + 2 * STEP + 2, 2, 2, 2 * EVALUATION + 2 * 2 + 1),
}
STOPS = [
    pytest.param(stage, *stop, id=f"{stage.module_key} {when}")
    for stage, stops in ((DISTILL, DISTILL_STOPS), (RDPO, RDPO_STOPS))
    for when, stop in stops.items()
]


@pytest.mark.parametrize("stage, look, stopped, evaluated, chunks", STOPS)
def test_a_stop_in_mid_step_abandons_it_and_the_run_goes_on_to_the_same_end(
    tmp_path, monkeypatch, stage, whole, look, stopped, evaluated, chunks
):
    computed: list[int] = []
    chunk = ChunkGradient if stage is DISTILL else Scorer
    original = chunk.__call__
    monkeypatch.setattr(chunk, "__call__", lambda self, *rest: computed.append(0) or original(self, *rest))
    with monkeypatch.context() as patch:
        StopAtCheck(patch, look)
        out = invoke(stage.main, *stage.arguments(tmp_path, "cut"))
    cut = stage.run_of(tmp_path, "cut")
    assert f"stopped at step {stopped} as asked; go on with --resume" in out
    assert len(computed) == chunks
    state = cut.load_checkpoint()
    assert (state["step"], state["evaluated"]) == (stopped, evaluated)
    stage.resume(cut)
    assert stage.outcome(cut) == stage.outcome(whole)


@pytest.mark.parametrize("look, shards", [(2, 1), (6, 3)])
def test_a_stop_before_the_first_step_ends_after_the_shard_in_hand(
    tmp_path, monkeypatch, whole_distill, look, shards
):
    with monkeypatch.context() as patch:
        StopAtCheck(patch, look)
        out = invoke(DISTILL.main, *DISTILL.arguments(tmp_path, "cut"))
    assert (
        f"stopped before step 1 as asked; what is complete in {tmp_path / 'banks'} is kept: run the same"
        " command again" in out
    )
    assert len(list((tmp_path / "banks").rglob("*.safetensors"))) == shards
    assert DISTILL.outcome(DISTILL.start(tmp_path, "again")) == DISTILL.outcome(whole_distill)


def test_a_run_without_any_evaluation_has_nothing_to_export(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        StopAtCheck(patch, 1)
        out = invoke(RDPO.main, *RDPO.arguments(tmp_path, "cut"))
    assert "wrote" not in out
    assert list(RDPO.run_of(tmp_path, "cut").export.iterdir()) == []


def test_a_crash_after_an_evaluation_that_no_checkpoint_knows_of_makes_it_once(
    tmp_path, monkeypatch, whole_rdpo
):
    """A checkpoint by time, between a step and its evaluation, is all that is left."""
    often = ("logging.save_interval=1000", "logging.save_minutes=10")
    monkeypatch.setattr(CheckpointTimer, "due", lambda timer: True)
    run = RDPO.start(tmp_path, "cut", *often, more=("--max-steps", 4))
    monkeypatch.undo()
    state = run.load_checkpoint()
    run.save_checkpoint(4, state | {"evaluated": 2, "best": state["best"] | {"stale": 0}})
    assert run.records()[-1]["step"] == 4
    assert "table" in run.records()[-1]
    invoke(RDPO.main, "--resume", run.path, *CPU)
    records = [json.dumps(r) for r in run.records()]
    assert len(records) == len(set(records)) == len(whole_rdpo.records())


@pytest.mark.parametrize("minutes, written", [("1e-9", 2 + 2 * 6), ("null", 2)])
def test_checkpoints_by_time_change_nothing(tmp_path, monkeypatch, stage, whole, minutes, written):
    """At step 0 and at the end always; by time after each of six steps and after its evaluation too."""
    saved: list[int] = []
    original = CheckpointTimer.restart
    monkeypatch.setattr(CheckpointTimer, "restart", lambda timer: saved.append(0) or original(timer))
    in_steps, in_minutes = stage.checkpoints
    run = stage.start(tmp_path, "often", f"{in_minutes}={minutes}", f"{in_steps}=1000")
    assert stage.outcome(run) == stage.outcome(whole)
    assert len(saved) == written


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


SLOW_CHUNKS = """
import sys
import time

from common.errors import run_command
from training.distill import launch
from training.distill.gradients import ChunkGradient

original, chunks = ChunkGradient.__call__, []


def slow(self, indices):
    chunks.append(0)
    if len(chunks) > {quick}:
        open({log!r}, "a").write("chunk\\n")
        time.sleep(2)
    return original(self, indices)


ChunkGradient.__call__ = slow
launch.draw = lambda *_: None
sys.argv = ["training.distill.launch", *{arguments!r}]
run_command(launch.main)
"""


def test_sigterm_to_torchrun_ends_two_processes_before_the_step_would(tmp_path):
    """A step takes each of two processes 40 s and torchrun kills 30 s after SIGTERM; the run ends within a
    chunk, and its checkpoint is the step before.
    """
    settings = ("train.batch=40", "train.chunk=1", "train.steps=2", "evaluation.baselines=[]")
    whole = DISTILL.start(tmp_path, "whole", *settings)
    log, script = tmp_path / "chunks", tmp_path / "slow.py"
    arguments = DISTILL.arguments(tmp_path, "cut", *settings)
    script.write_text(SLOW_CHUNKS.format(quick=20, log=str(log), arguments=arguments))
    command = ("--standalone", "--nproc_per_node=2", str(script))
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = forked.start("torch.distributed.run", *command, environment=environment)
    slow = lambda: log.exists() and log.read_text().count("chunk") >= 2  # noqa: E731
    begun = time.monotonic()
    done: subprocess.CompletedProcess = process.signal_when(slow, signal.SIGTERM, alone=True)
    seconds = time.monotonic() - max(begun, log.stat().st_mtime - time.time() + time.monotonic())
    assert "stopped at step 1 as asked; go on with --resume" in done.stdout + done.stderr
    assert seconds < 20
    cut = DISTILL.run_of(tmp_path, "cut")
    assert cut.load_checkpoint()["step"] == 1
    DISTILL.resume(cut)
    assert DISTILL.outcome(cut) == DISTILL.outcome(whole)


def slow_chunks(log, arguments) -> None:
    """The command line where all chunks of a rank after the first step's two take a second."""
    computed: list[int] = []
    original = ChunkGradient.__call__

    def slow(self, indices):
        computed.append(0)
        if len(computed) > 2:
            with open(log, "a") as file:
                file.write("chunk\n")
            time.sleep(1)
        return original(self, indices)

    ChunkGradient.__call__ = slow
    launch.draw = lambda *_: None
    DISTILL.main(arguments, standalone_mode=False)


def test_one_of_two_processes_is_stopped_in_mid_step(tmp_path, whole_distill):
    """SIGTERM to one rank ends both, before a step that takes 2 s of each."""
    log = tmp_path / "chunks"
    process = forked.Forked(slow_chunks, log, DISTILL.arguments(tmp_path, "cut"), ranks=2)
    slow = lambda: log.exists() and log.read_text().count("chunk") >= 1  # noqa: E731
    done = process.signal_when(slow, signal.SIGTERM, alone=True)
    assert done.returncode == 0, done.stderr
    assert "stopped at step 1 as asked" in done.stdout
    assert log.read_text().count("chunk") <= 2
    cut = DISTILL.run_of(tmp_path, "cut")
    DISTILL.resume(cut)
    assert DISTILL.outcome(cut) == DISTILL.outcome(whole_distill)
