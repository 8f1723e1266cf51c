"""Checkpoints are kept and found in the order of their steps."""

from training.run_folder import RunFolder


def test_the_newest_are_kept_when_steps_get_another_digit(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    (run.checkpoints / "step of mine.pt").write_text("not a checkpoint")
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        run.save_checkpoint(step, {"step": step})
    assert run.latest_checkpoint() == run.checkpoint(1_000_001)
    assert run.load_checkpoint() == {"step": 1_000_001}
    assert {p.stem for p in run.checkpoints.iterdir()} == {"step of mine", "step1000000", "step1000001"}
