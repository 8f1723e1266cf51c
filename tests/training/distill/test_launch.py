"""The distillation command line: what a run writes, starts of students, one-line errors."""

import json

import pytest
import torch

from solvers import (
    Predictor,
    SolverTable,
    Spec,
    load_predictor,
    polynomial,
    resolve_predictor_path,
    save_predictor,
)
from training.config import load_config
from training.distill.checks import check
from training.distill.config import DistillConfig

from ... import forked
from ..runs import DISTILL, invoke, overrides


def evaluations(run) -> list[dict]:
    """The records of held-out evaluations."""
    return [r for r in run.records() if "heldout" in r]


def best_of(run) -> Predictor:
    """The best predictor of a run."""
    return load_predictor(resolve_predictor_path(str(run.path)))


def test_a_run_writes_all_it_promises(whole_distill):
    run = whole_distill
    written = [".lock", "checkpoints", "configs", "error.png", "export", "logs", "table.png"]
    assert sorted(p.name for p in run.path.iterdir()) == written
    records = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    measured = [r for r in records if "heldout" in r]
    assert [r["step"] for r in measured] == [0, 2, 4, 6]
    assert {"heldout_se", "baseline", "difference", "difference_se", "ratio"} <= measured[0].keys()
    assert list((run.path / "logs").glob("events.*"))
    best = best_of(run)
    assert best.provenance["heldout_rmse"] == min(r["heldout"] for r in measured)
    recorded = {"teacher", "bank", "loss", "parent", "teacher_rmse_to_twice_as_fine", "step"}
    assert recorded <= best.provenance.keys()
    assert best.spec.guidance_rate == 3.0
    assert (run.export / "network-snapshot-export-step000006.pkl").is_file()


def test_a_tableau_is_widened_into_a_better_one(tmp_path):
    """K stages in every level, the first included, from a learned tableau of one: it starts where
    that ended.
    """
    tableau = ("student.kind=tableau", "student.learn_sigmas=true", "train.steps=2")
    one = DISTILL.start(
        tmp_path, "one", *tableau, "student.start=baseline", "student.depth=3", "student.num_points=1"
    )
    best = best_of(one)
    wide = (*tableau, f"student.start={one.path}", "student.num_points=3", "student.first_points=3")
    for name, more, levels in (("same", (), [1, 1, 1]), ("wide", ("student.widen=true",), [3, 3, 3])):
        run = DISTILL.start(tmp_path, name, *wide, *more)
        assert [len(level) for level in best_of(run).table.levels] == levels, name
        assert evaluations(run)[0]["heldout"] == pytest.approx(best.provenance["heldout_rmse"], rel=1e-6)


def test_more_processes_than_chunks(tmp_path):
    settings = ("train.chunk=8", "train.steps=2")
    whole = DISTILL.start(tmp_path, "whole", *settings)
    done = forked.start(DISTILL.module, *DISTILL.arguments(tmp_path, "two", *settings), ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert DISTILL.outcome(DISTILL.run_of(tmp_path, "two")) == DISTILL.outcome(whole)


def test_a_loss_that_is_not_finite_names_step_and_interval_and_saves_the_table(tmp_path, monkeypatch):
    from backends.gaussian import GaussianMixture

    original, calls = GaussianMixture.velocity, []

    def velocity(self, condition):
        inner = original(self, condition)

        def broken(x, sigma):
            calls.append(len(x))
            out = inner(x, sigma)
            learning = torch.is_grad_enabled() and len(calls) % 2 == 0
            return out * float("nan") if learning and torch.as_tensor(sigma).max() < 3 else out

        return broken

    monkeypatch.setattr(GaussianMixture, "velocity", velocity)
    message = DISTILL.error(*DISTILL.arguments(tmp_path, "nan"))
    run = DISTILL.run_of(tmp_path, "nan")
    assert "step 1" in message
    assert "interval" in message
    assert run.latest_checkpoint() == run.checkpoint(0)
    torch.testing.assert_close(best_of(run).table.r, SolverTable.uniform(3, 2).r)


def test_dry_run_loads_and_writes_nothing(tmp_path):
    out = invoke(DISTILL.main, *DISTILL.arguments(tmp_path, "dry", "train.steps=7", more=("--dry-run",)))
    assert "steps: 7" in out
    assert "24 teacher trajectories of 12 intervals of dpm2" in out
    assert not (tmp_path / "exps").exists()
    assert not (tmp_path / "banks").exists()


@pytest.mark.parametrize("path", sorted(DISTILL.configs.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    check(load_config(DistillConfig, path))
    assert "# dry run: " in invoke(DISTILL.main, "--config", path, "--dry-run")


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.stepz=3", "train.stepz"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps is 0, expected at least 1"),
        ("train.checkpoint_minutes=0", "train.checkpoint_minutes is 0.0, expected a number above 0"),
        ("train.lr=nan", "train.lr is nan"),
        ("train", "expected section.key=value"),
        ("backend.name=pixart", "backend.name is 'pixart', expected one of"),
        ("student.kind=net", "student.kind"),
        ("student.scale_dir=1.5", "student.scale_dir is 1.5"),
        ("student.start=baseline", "student.start"),
        ("student.start=nowhere.pkl", "nowhere.pkl"),
        ("bank.prompts=nowhere.txt", "nowhere.txt"),
        ("bank.heldout_seed=1000010", "overlap"),
        ("loss.final=0", "loss: all weights are 0"),
        ("loss.start=1", "loss.start holds a tableau near its start"),
        ("loss.feature=1", "loss.feature_network is not set"),
        ("teacher.solver=rk4", "teacher.solver is 'rk4'"),
        ("evaluation.baselines=[euler,foo]", "foo"),
        ("evaluation.tuning_pairs=99", "evaluation.tuning_pairs is 99"),
        ("nodes.schedule=karras", "nodes.schedule is 'karras'"),
        ("nodes.sigma_min=-1", "nodes.sigma_min is -1"),
        ("train.seed=99999999999999999", "train.seed is 99999999999999999"),
        ("train.lr=${foo}", "foo"),
        ("train.lr=${", "train.lr"),
        ("evaluation.baselines[0]=euler", "evaluation.baselines"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_written(tmp_path, override, message):
    assert message in DISTILL.error(*DISTILL.arguments(tmp_path, "wrong", override))
    assert not (tmp_path / "exps").exists()


def test_a_start_that_does_not_fit_is_named(tmp_path):
    spec = Spec(backend="gaussian", schedule_type="polynomial")
    save_predictor(Predictor(SolverTable.uniform(3, 3), spec), tmp_path / "start.pkl")
    message = DISTILL.error(*DISTILL.arguments(tmp_path, "wrong", f"student.start={tmp_path / 'start.pkl'}"))
    assert "student.num_points is 2" in message
    assert "3" in message


def test_an_earlier_name_of_a_key_is_read_with_a_note(tmp_path):
    config = DISTILL.write_config(tmp_path)
    config.write_text(config.read_text().replace("{num_points: 2}", "{num_points: 2, resolution: 0.25}"))
    for arguments in (("--config", config), ("--config", config, *overrides("student.resolution=0.25"))):
        out = invoke(DISTILL.main, *arguments, "--dry-run")
        assert "student.resolution is called student.moment_damping now" in out
        assert "  moment_damping: 0.25\n" in out


def test_a_backbone_of_the_users_own_is_loaded_where_its_configuration_names_it(tmp_path, monkeypatch):
    (tmp_path / "own_backbone.py").write_text("from backends.gaussian import FAMILY\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = DISTILL.start(tmp_path, "own", "backend.name=own_backbone:FAMILY", "train.steps=1")
    assert best_of(run).spec.backend == "own_backbone:FAMILY"


def test_a_predictor_is_a_start_with_its_learned_nodes(tmp_path):
    settings = ("train.steps=2", "student.learn_sigmas=true")
    first = DISTILL.start(tmp_path, "first", *settings)
    path = first.export / "network-snapshot-export-step000002.pkl"
    nodes = load_predictor(path).sigmas
    assert not torch.allclose(nodes, polynomial(4, *nodes[[-1, 0]].tolist()))
    second = DISTILL.start(tmp_path, "second", f"student.start={path}", *settings)
    assert evaluations(second)[0]["heldout"] == pytest.approx(evaluations(first)[-1]["heldout"], rel=1e-6)
    assert "sha256" in best_of(second).provenance["parent"]
    path.write_bytes(other_table(tmp_path))
    message = DISTILL.error("--resume", second.path, "--exps", tmp_path / "exps")
    assert "its start (student.start) changed since its checkpoint" in message


def other_table(folder) -> bytes:
    """A predictor that fits the small configuration but is another."""
    spec = Spec(backend="gaussian", schedule_type="polynomial")
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec), folder / "other.pkl")
    return (folder / "other.pkl").read_bytes()


def test_a_run_that_stops_early_is_saved_as_it_ended(tmp_path):
    run = DISTILL.start(tmp_path, "early", "train.patience=1", "train.lr=0", "train.checkpoint_interval=100")
    assert run.latest_checkpoint() == run.checkpoint(2)
    before = DISTILL.outcome(run)
    DISTILL.resume(run)
    assert DISTILL.outcome(run) == before


def test_a_checkpoint_from_before_the_shared_loop_is_gone_on_from(tmp_path, whole_distill):
    """It has the bank and the start at its top level, and no step that was evaluated last."""
    run = DISTILL.start(tmp_path, "parts", more=("--max-steps", 4))
    state = run.load_checkpoint()
    names = {"bank": "bank", "parent": "start (student.start)"}
    earlier = {old: state["depends_on"][new] for old, new in names.items()}
    kept = {k: v for k, v in state.items() if k not in ("depends_on", "evaluated")}
    run.save_checkpoint(4, kept | earlier)
    DISTILL.resume(run)
    assert DISTILL.outcome(run) == DISTILL.outcome(whole_distill)
