"""The command line: dry run, one-line errors, resume to the same bits, signals, two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from solvers import (
    Predictor,
    SolverTable,
    Spec,
    UserError,
    load_predictor,
    polynomial,
    resolve_predictor_path,
    save_predictor,
)
from training.config import load_config
from training.distill import launch
from training.distill.config import DistillConfig, check
from training.run_folder import RunFolder

from ... import forked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "distill" / "cfgs"
SMALL = """
backend: {name: gaussian}
guidance_scale: 3.0
nodes: {num_steps: 4, schedule: polynomial}
student: {num_points: 2}
teacher: {inner: 3, check: 4}
bank: {folder: FOLDER/banks, prompts: FOLDER/prompts.txt, pairs: 16, heldout_pairs: 8, shard_size: 8}
train: {steps: 6, batch: 8, chunk: 2, checkpoint_interval: 2}
evaluation: {interval: 2, batch: 4, baselines: [euler, ipndm2], schedules: [polynomial], tuning_pairs: 8}
"""


CPU = ("--device", "cpu")  # where runs in processes of their own are too
LONGER = ["--override", "train.steps=150", "--override", "evaluation.interval=75", "--override"]
RARELY = [*LONGER, "train.checkpoint_interval=1000"]


def write_config(folder: Path) -> Path:
    """A small configuration and its prompts."""
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(20)))
    path = folder / "small.yaml"
    path.write_text(SMALL.replace("FOLDER", str(folder)))
    return path


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """A run of the small configuration that nothing stopped; not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    return start(folder, write_config(folder), "whole")


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> dict[str, bytes]:
    """What comes out of the same over more steps, with a checkpoint at the end alone."""
    folder = tmp_path_factory.mktemp("longer")
    return outcome(start(folder, write_config(folder), "whole", *RARELY))


def invoke(*arguments) -> str:
    result = CliRunner().invoke(launch.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        invoke(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def run_of(exps: Path, name: str) -> RunFolder:
    return RunFolder(next(exps.glob(f"*-{name}")))


def arguments_of(config: Path, exps: Path, name: str, *more: object) -> list[str]:
    """The command line of a new run."""
    return [str(a) for a in ("--config", config, "--exps", exps, "--run-name", name, *CPU, *more)]


def start(tmp_path, config, name, *more) -> RunFolder:
    invoke(*arguments_of(config, tmp_path / "exps", name, *more))
    return run_of(tmp_path / "exps", name)


def outcome(run: RunFolder) -> dict[str, bytes]:
    """All that must be the same to the byte."""
    files = [run.metrics, *sorted(run.export.glob("*.pkl"))]
    state = run.load_checkpoint()
    tensors = {k: v.numpy().tobytes() for k, v in state["student"].items()}
    moments = {
        f"{i} {k}": v.numpy().tobytes() for i, s in state["optimiser"]["state"].items() for k, v in s.items()
    }
    return {f.name: f.read_bytes() for f in files} | tensors | moments


def test_a_run_writes_all_it_promises(whole):
    run = whole
    assert sorted(p.name for p in run.path.iterdir()) == [
        "checkpoints",
        "configs",
        "error.png",
        "export",
        "logs",
        "table.png",
    ]
    records = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    evaluations = [r for r in records if "heldout" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4, 6]
    assert {"heldout_se", "baseline", "difference", "difference_se", "ratio"} <= evaluations[0].keys()
    assert list((run.path / "logs").glob("events.*"))
    best = load_predictor(resolve_predictor_path(str(run.path)))
    assert best.provenance["heldout_rmse"] == min(r["heldout"] for r in evaluations)
    assert {
        "teacher",
        "bank",
        "loss",
        "parent",
        "teacher_rmse_to_twice_as_fine",
        "step",
    } <= best.provenance.keys()
    assert best.spec.guidance_rate == 3.0
    assert (run.export / "network-snapshot-export-step000006.pkl").is_file()


@pytest.mark.parametrize("student", ["table", "tableau"])
def test_three_steps_and_three_more_are_six(tmp_path, config, student):
    kind = [
        "student.kind=tableau",
        "student.start=baseline",
        "student.depth=4",
        "student.learn_sigmas=true",
        "train.lr=0.1",
    ]
    more = [part for text in kind for part in ("--override", text)] if student == "tableau" else []
    whole = start(tmp_path, config, "whole", *more)
    parts = start(tmp_path, config, "parts", "--max-steps", 3, *more)
    assert parts.latest_checkpoint() == parts.checkpoint(3)
    with open(parts.metrics, "a") as file:  # what a killed run had done after its checkpoint
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    invoke("--resume", parts.path, "--exps", tmp_path / "exps", *CPU)
    for path in parts.export.glob("*step000003.pkl"):
        path.unlink()  # the last table when it stopped
    assert outcome(parts) == outcome(whole)


def test_a_tableau_is_widened_into_a_better_one(tmp_path, config):
    """K stages in every level, the first included, from a learned tableau of one: it starts where
    that ended.
    """
    narrow = [
        "student.kind=tableau",
        "student.start=baseline",
        "student.depth=3",
        "student.num_points=1",
        "student.learn_sigmas=true",
    ]
    one = start(tmp_path, config, "one", *[part for text in narrow for part in ("--override", text)])
    best = load_predictor(resolve_predictor_path(str(one.path)))
    wide = [
        *narrow[:1],
        *narrow[4:],
        f"student.start={one.path}",
        "student.num_points=3",
        "student.first_points=3",
    ]
    arguments = [part for text in wide for part in ("--override", text)]
    for name, told, levels in [
        ("as it is", [], [1, 1, 1]),
        ("widened", ["--override", "student.widen=true"], [3, 3, 3]),
    ]:
        run = start(tmp_path, config, name.split()[0], *arguments, *told)
        found = load_predictor(resolve_predictor_path(str(run.path)))
        assert [len(level) for level in found.table.levels] == levels, name
        first = next(json.loads(line) for line in run.metrics.read_text().splitlines() if "heldout" in line)
        assert first["heldout"] == pytest.approx(best.provenance["heldout_rmse"], rel=1e-6)


def test_two_processes_and_a_resume_give_the_bits_of_one(tmp_path, config, whole):
    exps = tmp_path / "exps"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "training.distill.launch",
    ]
    command += arguments_of(config, exps, "two", "--max-steps", 3)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    two = run_of(exps, "two")
    done = forked.start("training.distill.launch", "--exps", exps, "--resume", two.path, *CPU, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    for path in two.export.glob("*step000003.pkl"):
        path.unlink()
    assert outcome(two) == outcome(whole)


def test_more_processes_than_chunks(tmp_path, config):
    more = ("--override", "train.chunk=8", "--override", "train.steps=2")
    whole = start(tmp_path, config, "whole", *more)
    done = forked.start(
        "training.distill.launch", *arguments_of(config, tmp_path / "exps", "two", *more), ranks=2
    ).wait()
    assert done.returncode == 0, done.stderr
    assert outcome(run_of(tmp_path / "exps", "two")) == outcome(whole)


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(tmp_path, config, longer):
    exps = tmp_path / "exps"
    process = forked.start("training.distill.launch", *arguments_of(config, exps, "cut", *RARELY))
    begun = lambda: any('"loss"' in p.read_text() for p in exps.glob("*-cut/logs/metrics.jsonl"))  # noqa: E731
    done = process.signal_when(begun, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    cut = run_of(exps, "cut")
    stopped = int(cut.latest_checkpoint().stem[4:])
    assert 0 < stopped < 150
    assert f"stopped at step {stopped} as asked" in done.stdout
    assert "--resume" in done.stdout
    invoke("--resume", "latest", "--exps", exps, *CPU)
    for path in cut.export.glob(f"*step{stopped:06d}.pkl"):
        path.unlink()
    assert outcome(cut).items() >= longer.items()


def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path, config, longer):
    often = [*LONGER, "train.checkpoint_interval=20"]
    exps = tmp_path / "exps"
    process = forked.start("training.distill.launch", *arguments_of(config, exps, "cut", *often))
    done = process.signal_when(lambda: any(exps.glob("*-cut/checkpoints/step*[1-9]*.pt")))
    assert done.returncode == -signal.SIGKILL
    cut = run_of(exps, "cut")
    assert 0 < int(cut.latest_checkpoint().stem[4:]) < 150
    invoke("--resume", cut.path, "--exps", exps, *CPU)
    assert outcome(cut).items() >= longer.items()


def test_a_loss_that_is_not_finite_names_step_and_interval_and_saves_the_table(tmp_path, config, monkeypatch):
    from backends.gaussian import GaussianMixture

    honest, calls = GaussianMixture.velocity, []

    def velocity(self, condition):
        inner = honest(self, condition)

        def broken(x, sigma):
            calls.append(len(x))
            out = inner(x, sigma)
            return (
                out * float("nan")
                if torch.is_grad_enabled() and len(calls) % 2 == 0 and torch.as_tensor(sigma).max() < 3
                else out
            )

        return broken

    monkeypatch.setattr(GaussianMixture, "velocity", velocity)
    message = refused("--config", config, "--exps", tmp_path / "exps", "--run-name", "nan")
    run = run_of(tmp_path / "exps", "nan")
    assert "step 1" in message
    assert "interval" in message
    assert run.latest_checkpoint() == run.checkpoint(0)
    torch.testing.assert_close(
        load_predictor(resolve_predictor_path(str(run.path))).table.r, SolverTable.uniform(3, 2).r
    )


def test_dry_run_loads_and_writes_nothing(tmp_path, config):
    out = invoke("--config", config, "--exps", tmp_path / "exps", "--dry-run", "--override", "train.steps=7")
    assert "steps: 7" in out
    assert "24 teacher trajectories of 12 intervals of dpm2" in out
    assert not (tmp_path / "exps").exists()
    assert not (tmp_path / "banks").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    check(load_config(DistillConfig, path))
    assert "# dry run: " in invoke("--config", path, "--dry-run")


@pytest.mark.parametrize(
    "override, told",
    [
        ("train.stepz=3", "train.stepz"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps is 0, expected at least 1"),
        ("train.checkpoint_minutes=0", "train.checkpoint_minutes is 0.0, expected a number above 0"),
        ("train.lr=nan", "train.lr is nan"),
        ("train", "expected section.key=value"),
        ("backend.name=sdxl", "backend.name is 'sdxl', expected one of"),
        ("student.kind=net", "student.kind"),
        ("student.scale_dir=1.5", "student.scale_dir is 1.5"),
        ("student.start=baseline", "student.start"),
        ("student.start=nowhere.pkl", "nowhere.pkl"),
        ("bank.prompts=nowhere.txt", "nowhere.txt"),
        ("bank.heldout_seed=1000010", "overlap"),
        ("loss.final=0", "loss: all weights are 0"),
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
def test_mistakes_get_one_line_before_anything_is_written(tmp_path, config, override, told):
    assert told in refused("--config", config, "--exps", tmp_path / "exps", "--override", override)
    assert not (tmp_path / "exps").exists()


def test_mistakes_of_files_and_options(tmp_path, config):
    assert "nowhere.yaml" in refused("--config", "nowhere.yaml")
    (tmp_path / "bad.yaml").write_text("train: [1, 2")
    assert "not YAML" in refused("--config", tmp_path / "bad.yaml")
    for text in ("- 1", "5", "true"):
        (tmp_path / "list.yaml").write_text(text)
        assert "sections" in refused("--config", tmp_path / "list.yaml")
    assert "either --config" in refused()
    assert "--override" in refused("--resume", "x", "--override", "train.steps=3")
    assert "no run" in refused("--resume", "latest", "--exps", tmp_path / "none")
    assert "no run folder" in refused("--resume", "nothing", "--exps", tmp_path)
    assert "--run-name" in refused("--config", config, "--exps", tmp_path / "exps", "--run-name", "a/b")


def test_a_start_that_does_not_fit_is_named(tmp_path, config):
    table = SolverTable.uniform(3, 3)
    save_predictor(
        Predictor(table, Spec(backend="gaussian", schedule_type="polynomial")), tmp_path / "start.pkl"
    )
    told = refused(
        "--config",
        config,
        "--override",
        f"student.start={tmp_path / 'start.pkl'}",
        "--exps",
        tmp_path / "exps",
    )
    assert "student.num_points is 2" in told
    assert "3" in told


def test_a_predictor_is_a_start(tmp_path, config):
    first = start(tmp_path, config, "first")
    found = resolve_predictor_path(str(first.path))
    second = start(
        tmp_path, config, "second", "--override", f"student.start={found}", "--override", "train.steps=2"
    )
    begun, ended = (json.loads(r.metrics.read_text().splitlines()[i]) for r, i in ((second, 0), (first, -1)))
    assert begun["heldout"] == pytest.approx(min(ended["heldout"], begun["heldout"]), rel=1e-6)
    assert "sha256" in load_predictor(resolve_predictor_path(str(second.path))).provenance["parent"]


def test_learned_nodes_of_a_start_are_kept(tmp_path, config):
    learned = ["--override", "student.learn_sigmas=true"]
    first = start(tmp_path, config, "first", *learned)
    found = first.export / "network-snapshot-export-step000006.pkl"
    nodes = load_predictor(found).sigmas
    assert not torch.allclose(nodes, polynomial(4, *nodes[[-1, 0]].tolist()))
    second = start(
        tmp_path,
        config,
        "second",
        "--override",
        f"student.start={found}",
        "--override",
        "train.steps=2",
        *learned,
    )
    begun, ended = (json.loads(r.metrics.read_text().splitlines()[i]) for r, i in ((second, 0), (first, -1)))
    assert begun["heldout"] == pytest.approx(ended["heldout"], rel=1e-6)


def test_a_run_that_stops_early_is_saved_as_it_ended(tmp_path, config):
    run = start(
        tmp_path,
        config,
        "early",
        "--override",
        "train.patience=1",
        "--override",
        "train.lr=0",
        "--override",
        "train.checkpoint_interval=100",
    )
    assert run.latest_checkpoint() == run.checkpoint(2)
    before = outcome(run)
    invoke("--resume", run.path, "--exps", tmp_path / "exps", *CPU)
    assert outcome(run) == before


def test_a_start_that_changed_is_not_gone_on_from(tmp_path, config):
    first = start(tmp_path, config, "first")
    found = resolve_predictor_path(str(first.path))
    second = start(tmp_path, config, "second", "--override", f"student.start={found}", "--max-steps", 2)
    found.write_bytes(other_table(tmp_path))
    assert "its student started from" in refused("--resume", second.path, "--exps", tmp_path / "exps")


def other_table(tmp_path) -> bytes:
    """A predictor that fits the small configuration but is another."""
    save_predictor(
        Predictor(SolverTable.uniform(3, 2), Spec(backend="gaussian", schedule_type="polynomial")),
        tmp_path / "other.pkl",
    )
    return (tmp_path / "other.pkl").read_bytes()


def test_a_damaged_checkpoint_is_named(tmp_path, config):
    run = start(tmp_path, config, "whole", "--max-steps", 2)
    path = run.latest_checkpoint()
    path.write_bytes(path.read_bytes()[:100])
    assert path.name in refused("--resume", run.path, "--exps", tmp_path / "exps")
