"""Where a run reports to: the viewers, their checks, validation images."""

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import log

from .runs import DISTILL, RDPO


def test_an_evaluation_writes_the_same_prompts_and_seeds_and_tensorboard_shows_them(tmp_path):
    run = RDPO.start(tmp_path, "pictures", "logging.validation_images=3", "ppo.learning_rate=0.5")
    paths = sorted((run.path / "validation").glob("*.png"))
    assert [p.name for p in paths] == [f"step{n:06d}.png" for n in (0, 2, 4, 6)]
    pixels = [np.asarray(Image.open(p)) for p in paths]
    side = pixels[0].shape[0]
    assert all(p.shape == (side, 3 * side, 3) for p in pixels)
    assert (pixels[0] != pixels[3]).any()
    board = EventAccumulator(str(run.path / "logs"))
    board.Reload()
    assert [event.step for event in board.Images("validation")] == [0, 2, 4, 6]


def test_a_resumed_run_has_the_same_validation_images(tmp_path):
    whole = RDPO.start(tmp_path, "whole")
    parts = RDPO.start(tmp_path, "parts", more=("--max-steps", 3))
    RDPO.resume(parts)
    held = [{p.name: p.read_bytes() for p in (run.path / "validation").iterdir()} for run in (whole, parts)]
    assert held[0] == held[1]
    assert len(held[0]) == 4


@pytest.mark.parametrize("stage", [RDPO, DISTILL])
def test_none_writes_no_events(tmp_path, stage):
    run = stage.start(tmp_path, "quiet", "logging.report_to=none", more=("--max-steps", 1))
    assert not list((run.path / "logs").glob("events.*"))
    assert run.records()


@pytest.mark.parametrize("stage", [RDPO, DISTILL])
def test_a_viewer_that_is_not_known_or_not_installed_is_one_line(tmp_path, stage, monkeypatch):
    wrong = stage.error(*stage.arguments(tmp_path, "no", "logging.report_to=tensorbord"))
    assert "did you mean tensorboard" in wrong
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    missing = stage.error(*stage.arguments(tmp_path, "no", "logging.report_to=wandb"))
    assert "logging.report_to is wandb, which is not installed: run pip install wandb" in missing


def test_wandb_offline_writes_a_run_of_the_folders_name(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RDPO.start(tmp_path, "cloud", "logging.report_to=wandb", more=("--max-steps", 2))
    (folder,) = (run.path / "logs" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run.path.name)
    (file,) = folder.glob("*.wandb")
    content = file.read_bytes()
    assert b"gain_digits" in content
    assert b"validation" in content
