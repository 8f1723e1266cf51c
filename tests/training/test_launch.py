"""Both command lines: a run in parts, by several processes, killed or stopped, ends in the bytes of the whole
one.
"""

import json
import os
import signal

import pytest
import torch

from .. import forked
from .runs import DISTILL, RDPO, overrides, run_slowly

TABLEAU = ("student.kind=tableau", "student.start=baseline", "student.depth=4", "student.learn_sigmas=true")


@pytest.mark.parametrize(
    "stage, settings",
    [
        pytest.param(DISTILL, (), id="distill table"),
        pytest.param(DISTILL, TABLEAU, id="distill tableau"),
        pytest.param(RDPO, (), id="rdpo"),
    ],
)
def test_three_steps_and_three_more_are_six(tmp_path, stage, settings, request):
    whole = stage.start(tmp_path, "whole", *settings) if settings else request.getfixturevalue("whole")
    parts = stage.start(tmp_path, "parts", *settings, more=("--max-steps", 3))
    assert parts.latest_checkpoint() == parts.checkpoint(3)
    with open(parts.metrics, "a") as file:  # what a killed run had done after its checkpoint
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    stage.resume(parts)
    assert stage.outcome(parts) == stage.outcome(whole)


def test_two_processes_and_a_resume_give_the_bits_of_one(tmp_path, stage, whole):
    arguments = stage.arguments(tmp_path, "two", more=("--max-steps", 3))
    done = forked.start(stage.module, *arguments, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    two = stage.run_of(tmp_path, "two")
    assert two.latest_checkpoint() == two.checkpoint(3)
    stage.resume(two)
    assert stage.outcome(two) == stage.outcome(whole)


@pytest.mark.parametrize(
    "number, ranks, status", [(signal.SIGTERM, 1, 0), (signal.SIGKILL, 1, -9), (signal.SIGKILL, 2, -9)]
)
def test_a_run_that_is_stopped_or_killed_goes_on_to_the_same_end(
    tmp_path, stage, whole, number, ranks, status
):
    process = forked.Forked(run_slowly, stage.module, stage.arguments(tmp_path, "cut"), ranks=ranks)

    def in_its_midst() -> bool:
        metrics = (tmp_path / "exps").glob("*-cut/logs/metrics.jsonl")
        if not any('"step": 3' in path.read_text() for path in metrics):
            return False
        for other in process.processes[1:]:  # all ranks end together
            os.killpg(other.pid, number)
        return True

    done = process.signal_when(in_its_midst, number)
    assert done.returncode == status, done.stderr
    assert ("as asked; go on with --resume" in done.stdout) == (number == signal.SIGTERM)
    cut = stage.run_of(tmp_path, "cut")
    assert 0 < int(cut.latest_checkpoint().stem[4:]) < 6
    stage.resume(cut)
    assert stage.outcome(cut) == stage.outcome(whole)


def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path, stage, whole):
    torch.set_num_threads(2)
    try:
        many = stage.start(tmp_path, "many", more=("--max-steps", 2))
        assert torch.get_num_threads() == 1  # of this process, the run's only one
    finally:
        torch.set_num_threads(1)
    records = [r for r in whole.records() if r["step"] <= 2]
    assert [json.dumps(r) for r in many.records()] == [json.dumps(r) for r in records]


def test_a_damaged_checkpoint_is_named(tmp_path, stage):
    run = stage.start(tmp_path, "whole", more=("--max-steps", 1))
    path = run.latest_checkpoint()
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in stage.error("--resume", run.path)


def test_mistakes_of_files_and_options(tmp_path, stage):
    config = stage.write_config(tmp_path)
    assert "nowhere.yaml" in stage.error("--config", "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("train: [1, 2")
    assert "not YAML" in stage.error("--config", tmp_path / "bad.yaml")
    for text in ("- 1", "5", "true"):
        (tmp_path / "list.yaml").write_text(text)
        assert "sections" in stage.error("--config", tmp_path / "list.yaml")
    assert "either --config" in stage.error()
    assert "--override" in stage.error("--resume", "x", *overrides("train.steps=3"))
    assert "no run" in stage.error("--resume", "latest", stage.root, tmp_path / "none")
    assert "no run folder" in stage.error("--resume", "nothing", stage.root, tmp_path)
    exps = tmp_path / "exps"
    assert "--run-name" in stage.error("--config", config, stage.root, exps, "--run-name", "a/b")
