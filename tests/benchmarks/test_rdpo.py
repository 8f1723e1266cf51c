"""The measurements of RDPO: kept runs, rewards and gains, and CMA-ES with the same images."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import heldout_eval, rdpo, rdpo_rows, rdpo_runs, rdpo_tableaus, teacher_reference
from benchmarks.quality.cma_es import Logits, cma_es
from benchmarks.quality.heldout_eval import fresh_prompts
from digits.data import evaluation_prompts, training_prompts
from solvers import load_predictor

from .. import forked


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The shipped configuration cut to 2 steps of 16 images."""
    text = rdpo_runs.CONFIG.read_text()
    sizes = {"rollout_batch_size": 16, "rollout_chunk": 16, "minibatch_size": 8}
    for key, value in {**sizes, "steps": 2, "images": 4, "interval": 1}.items():
        before = text
        text = "\n".join(replaced(line, key, value) for line in text.splitlines())
        assert text != before
    (tmp_path / "digits.yaml").write_text(text)
    monkeypatch.setattr(rdpo_runs, "CONFIG", tmp_path / "digits.yaml")
    monkeypatch.setattr(rdpo_runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(rdpo_rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rdpo_rows, "WORK", tmp_path / "work")
    monkeypatch.setattr(teacher_reference, "TEACHER_INTERVALS", 2)
    monkeypatch.setattr(heldout_eval, "fresh_prompts", lambda: fresh_prompts()[:6])
    monkeypatch.setattr(rdpo_runs, "subprocess", SimpleNamespace(run=run))
    return tmp_path


def run(command: list[str], *, cwd: Path, env: dict[str, str], capture_output: bool, text: bool):
    """In place of subprocess.run, by a fork."""
    assert command[:2] == [sys.executable, "-m"]
    assert env["OMP_NUM_THREADS"] == "1"
    assert capture_output
    assert text
    return forked.start(*command[2:], environment=env, cwd=cwd).wait()


def replaced(line: str, key: str, value: int) -> str:
    """A line of YAML with another value of a key."""
    head, found, rest = line.partition(f" {key}: ")
    if not found:
        head, found, rest = line.partition(f"{{{key}: ")
    return f"{head}{found}{value}{rest.lstrip('0123456789')}" if found else line


def test_settings_are_compared_on_paired_images_and_runs_are_kept(small):
    rdpo.compare_settings(
        "two",
        6,
        1,
        1,
        {"narrow": ("ppo.dirichlet_concentration=300",), "wide": ("ppo.dirichlet_concentration=30",)},
    )
    rows = json.loads((small / "rdpo_two.json").read_text())["rows"]
    assert [r["solver"] for r in rows] == ["EPD distilled", "narrow, seed 0", "wide, seed 0"]
    assert all(r["depth"] == 4 and r["evaluations"] == 6 for r in rows)
    for row in rows[1:]:
        assert row["reward_gain"] == pytest.approx(row["reward"] - rows[0]["reward"])
        assert row["advantage_std"] > 0
    assert rows[2]["advantage_std"] > rows[1]["advantage_std"]
    runs = sorted(p.name for p in (small / "work").glob("2*"))
    assert len(runs) == 2
    again = rdpo_runs.Job("narrow", 0, ("ppo.dirichlet_concentration=300",))
    assert again.arguments()[0] == "--resume"
    assert rdpo_runs.Job("narrow", 1, ("ppo.dirichlet_concentration=300",)).arguments()[0] == "--config"


def test_cma_es_tries_tables_of_the_same_shape(small):
    found, start = cma_es(rdpo_runs.CONFIG, rdpo_runs.DISTILLED, 0, 0.1), load_predictor(rdpo_runs.DISTILLED)
    assert found.table.r.shape == start.table.r.shape
    assert torch.equal(found.sigmas, start.sigmas)
    assert (found.table.r.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(found.table.w.sum(-1), torch.ones(2, dtype=torch.float64))
    assert not torch.equal(found.table.r, start.table.r)
    own = Logits(start.table)
    again = own.tables(torch.tensor([own.origin], dtype=torch.float64))
    torch.testing.assert_close(again.r[0], start.table.r, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.w[0], start.table.w, rtol=0, atol=1e-5)


def test_tableaus_are_compared_with_their_starts_and_with_cma_es(small, monkeypatch):
    start = rdpo_tableaus.GRID / "tableau1-g7.5-d4.pkl"
    group = rdpo_tableaus.Group(start, "start", {"bound": (*rdpo_tableaus.GAUSSIAN, "ppo.anchor.kl=0.01")})
    evaluation = rdpo_rows.heldout(6)
    first, tuned = rdpo_rows.rows_of_runs(evaluation, group.name, group.jobs(1), 1)
    assert (tuned["depth"], tuned["evaluations"]) == (4, 4)
    assert tuned["reward_gain"] == pytest.approx(tuned["reward"] - first["reward"])
    settings = group.settings["bound"]
    best = rdpo_tableaus.kept_cma_es(start, 0, 0.3, settings)
    assert best.spec.solver == "tableau"
    assert best.table.stages.shape == load_predictor(start).table.stages.shape
    assert not torch.equal(best.table.stages, load_predictor(start).table.stages)
    monkeypatch.setattr(rdpo_tableaus, "cma_es", None)  # the kept one is read again
    again = rdpo_tableaus.kept_cma_es(start, 0, 0.3, settings)
    assert torch.equal(again.table.stages, best.table.stages)


def test_the_held_out_evaluation_has_prompts_that_nothing_was_trained_or_chosen_on():
    own = fresh_prompts()
    assert len(own) == len(set(own)) == 72
    assert not set(own) & {*training_prompts(10**4), *evaluation_prompts(256)}
