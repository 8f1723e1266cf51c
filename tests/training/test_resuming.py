"""A run goes on only where its folder is free and its checkpoint is its own; to the same bytes."""

import math

import pytest
import torch
import yaml

from common.records import exclusive
from training.run_folder import RunFolder

from .runs import CPU, DISTILL, RDPO, invoke


@pytest.fixture
def cut(tmp_path, stage) -> RunFolder:
    """A run that stopped after step 2."""
    return stage.start(tmp_path, "cut", more=("--max-steps", 2))


def refused(stage, run: RunFolder) -> str:
    """The line with which a run cannot go on."""
    return stage.error("--resume", run.path, stage.root, run.path.parent, *CPU)


def test_a_second_run_in_the_folder_is_refused_by_the_name_of_the_first(stage, cut):
    with exclusive(cut.path) as holder:
        text = refused(stage, cut)
    assert text == f"{cut.path}: another run is writing here ({holder}); wait for it, or stop it"
    stage.resume(cut)


def test_a_new_run_is_locked_too(tmp_path, stage, monkeypatch):
    seen = []
    original = RunFolder.save_checkpoint
    monkeypatch.setattr(
        RunFolder,
        "save_checkpoint",
        lambda run, *rest: seen.append((run.path / ".lock").read_text()) or original(run, *rest),
    )
    run = stage.start(tmp_path, "whole", more=("--max-steps", 1))
    assert all(text.startswith("process ") for text in seen)
    assert (run.path / ".lock").read_text() == ""


EDITS = {"distill": ("train", "seed", 1), "rdpo": ("run", "seed", 1)}
OTHER_EDITS = {"distill": ("train", "lr", 0.2), "rdpo": ("ppo", "clip_range", 0.3)}
FREE_EDITS = {"distill": ("train", "checkpoint_interval", 3), "rdpo": ("logging", "save_interval", 3)}


def edit(run: RunFolder, section: str, key: str, value: object) -> None:
    """Change a setting in the recorded configuration."""
    config = yaml.safe_load(run.config.read_text())
    config[section][key] = value
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))


def name_of(stage) -> str:
    return "distill" if stage is DISTILL else "rdpo"


@pytest.mark.parametrize("edits", [EDITS, OTHER_EDITS])
def test_an_edited_configuration_is_refused(stage, cut, edits):
    section, key, value = edits[name_of(stage)]
    edit(cut, section, key, value)
    text = refused(stage, cut)
    assert text.startswith(f"{cut.config}: {section}.{key} is {value}, but its checkpoint was made with ")


def test_settings_that_change_no_number_may_change(stage, cut, whole):
    edit(cut, *FREE_EDITS[name_of(stage)])
    stage.resume(cut)
    assert stage.outcome(cut) == stage.outcome(whole)


@pytest.mark.parametrize("step", [-1, 10**9, 2.0, "2", math.nan])
def test_a_checkpoint_of_an_impossible_step_is_refused(stage, cut, step):
    cut.save_checkpoint(2, cut.load_checkpoint() | {"step": step})
    assert f"its checkpoint is of step {step!r}, expected 0 to 6" in refused(stage, cut)


@pytest.mark.parametrize("place", ["module", "optimiser"])
def test_numbers_that_are_not_finite_are_refused(stage, cut, place):
    state = cut.load_checkpoint()
    parameters = state[stage.module_key] if place == "module" else state["optimiser"]["state"][0]
    name = next(k for k, v in parameters.items() if v.is_floating_point() and v.numel() > 1)
    parameters[name].view(-1)[0] = math.nan
    cut.save_checkpoint(2, state)
    assert "of its checkpoint holds numbers that are not finite" in refused(stage, cut)


def test_a_checkpoint_of_the_other_stage_is_refused(tmp_path):
    """And one that holds something else."""
    run = DISTILL.start(tmp_path, "cut", more=("--max-steps", 2))
    (tmp_path / "rdpo").mkdir()
    other = RDPO.start(tmp_path / "rdpo", "other", more=("--max-steps", 2))
    run.save_checkpoint(2, other.load_checkpoint())
    assert "its checkpoint is not one of this kind of run" in refused(DISTILL, run)
    run.save_checkpoint(2, {"step": 2})
    assert "its checkpoint is not one of this kind of run" in refused(DISTILL, run)


def test_numbers_of_another_shape_are_refused(stage, cut):
    state = cut.load_checkpoint()
    state[stage.module_key] = {k: torch.zeros(3, 3) for k in state[stage.module_key]}
    cut.save_checkpoint(2, state)
    assert "its checkpoint does not fit its configuration" in refused(stage, cut)


def test_an_earlier_checkpoint_without_settings_goes_on(stage, cut, whole):
    state = cut.load_checkpoint()
    del state["settings"]
    cut.save_checkpoint(2, state)
    stage.resume(cut)
    assert stage.outcome(cut) == stage.outcome(whole)


def test_checkpoints_have_the_same_bytes_after_a_resume(tmp_path, stage, cut):
    """Of the same configuration, whose banks and start are at the same place."""
    undisturbed = stage.start(tmp_path, "undisturbed")
    stage.resume(cut)
    assert cut.latest_checkpoint().read_bytes() == undisturbed.latest_checkpoint().read_bytes()


def test_the_bytes_of_a_checkpoint_do_not_depend_on_a_resume(stage, cut):
    """Written as it was read, it is the same file."""
    path = cut.latest_checkpoint()
    before = path.read_bytes()
    invoke(stage.main, "--resume", cut.path, stage.root, cut.path.parent, *CPU, "--max-steps", 2)
    assert path.read_bytes() == before
