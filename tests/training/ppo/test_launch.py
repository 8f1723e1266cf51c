"""The RDPO command line on the digits: what it writes, resume to the same bits, two processes, signals,
one-line errors.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from backends import load_backend
from digits import REWARD_FOLDER
from solvers import (
    Predictor,
    SolverTable,
    Spec,
    Tableau,
    UserError,
    compile_tableau,
    discrete,
    load_predictor,
    resolve_predictor_path,
    save_predictor,
)
from solvers.single_step import Euler
from training.config import load_config
from training.ppo import export_epd_predictor, launch
from training.ppo.config import RDPOConfig, check
from training.run_folder import RunFolder

from ... import forked

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "training" / "ppo" / "cfgs"
SMALL = """
run: {run_name: small}
data: {predictor_snapshot: FOLDER/start.pkl}
reward: {type: digits}
ppo: {rollout_batch_size: 8, rloo_k: 2, rollout_chunk: 4, minibatch_size: 4, ppo_epochs: 2, steps: 6,
  learning_rate: 0.05,
  dirichlet_concentration: 30}
evaluation: {interval: 2, images: 6, batch: 4, rewards: [judge]}
logging: {save_interval: 2}
"""
NODES = discrete(3, load_backend(Spec(backend="digits"), "cpu").noise_schedule)
SPEC = Spec(backend="digits", num_steps=3, num_points=2, schedule_type="discrete", guidance_rate=7.5)


CPU = ("--device", "cpu")  # where runs in processes of their own are too
LONGER = ["--override", "ppo.steps=16", "--override", "evaluation.interval=8"]


def write_config(folder: Path) -> Path:
    """A small configuration and its start table."""
    save_predictor(Predictor(SolverTable.uniform(2, 2), SPEC, NODES), folder / "start.pkl")
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
def longer(tmp_path_factory) -> RunFolder:
    """The same over more steps."""
    folder = tmp_path_factory.mktemp("longer")
    return start(folder, write_config(folder), "whole", *LONGER)


def invoke(*arguments, command=launch.main) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments, command=launch.main) -> str:
    with pytest.raises(UserError) as caught:
        invoke(*arguments, command=command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arguments_of(config: Path, folder: Path, name: str, *more: object) -> list[str]:
    """The command line of a new run."""
    return [
        str(a)
        for a in ("--config", config, "--output-root", folder / "exps", "--run-name", name, *CPU, *more)
    ]


def start(tmp_path, config, name, *more) -> RunFolder:
    invoke(*arguments_of(config, tmp_path, name, *more))
    return run_of(tmp_path, name)


def run_of(tmp_path, name) -> RunFolder:
    return RunFolder(next((tmp_path / "exps").glob(f"*-{name}")))


def outcome(run: RunFolder) -> dict[str, bytes]:
    """All that must be the same to the byte."""
    state = run.load_checkpoint()
    tensors = {k: v.numpy().tobytes() for k, v in state["policy"].items()}
    moments = {
        f"{i} {k}": v.numpy().tobytes() for i, s in state["optimiser"]["state"].items() for k, v in s.items()
    }
    return (
        {
            "metrics": run.metrics.read_bytes(),
            "best": (run.export / "network-snapshot-export-best.pkl").read_bytes(),
        }
        | tensors
        | moments
    )


def test_a_run_writes_all_it_promises(whole):
    run = whole
    records = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    steps = [r for r in records if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    told = {
        "approx_kl",
        "clipfrac",
        "ratio",
        "entropy",
        "kl",
        "concentration_pos",
        "drift_r",
        "reward_within_std",
        "reward_between_std",
    }
    assert told <= steps[0].keys()
    assert steps[0]["kl"] >= 0
    evaluations = [r for r in records if "table" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4, 6]
    assert evaluations[0]["gain_digits"] == evaluations[0]["gain_judge"] == 0
    assert evaluations[-1]["gain_digits_halfwidth"] > 0
    assert list((run.path / "logs").glob("events.*"))
    seconds = [json.loads(line) for line in (run.path / "logs" / "seconds.jsonl").read_text().splitlines()]
    assert seconds[1].keys() == {"step", "encode", "sample", "decode", "reward", "update"}
    assert all(value > 0 for record in seconds[1:] for value in record.values())
    predictor = load_predictor(resolve_predictor_path(str(run.path)))
    assert predictor.provenance["kind"] == "rdpo"
    assert torch.equal(predictor.sigmas, NODES)
    best = max(evaluations, key=lambda r: r["gain_digits"])
    assert predictor.table.r.tolist() == best["table"]["r"]  # what is exported is what was measured


def test_export_again_gives_the_same_table(tmp_path, whole):
    run = whole
    invoke(run.path, "--output-dir", tmp_path / "out", "--device", "cpu", command=export_epd_predictor.main)
    best = load_predictor(run.export / "network-snapshot-export-best.pkl")
    found = load_predictor(resolve_predictor_path(str(tmp_path / "out")))
    assert torch.equal(found.table.r, best.table.r)
    assert torch.equal(found.table.w, best.table.w)
    assert found.spec == best.spec
    manifest = json.loads(next((tmp_path / "out").glob("export-manifest-*.json")).read_text())
    assert all(r["step"] == best.provenance["step"] for r in manifest["metrics"])
    invoke(
        run.path,
        "--checkpoint",
        "step000004.pt",
        "--output-dir",
        tmp_path / "four",
        "--no-manifest",
        command=export_epd_predictor.main,
    )
    assert [p.name for p in (tmp_path / "four").iterdir()] == ["network-snapshot-export-step000004.pkl"]
    assert "step000004.pt" in refused(run.path, "--checkpoint", "x.pt", command=export_epd_predictor.main)
    assert "device 'cuda:99' cannot be used" in refused(
        run.path, "--device", "cuda:99", command=export_epd_predictor.main
    )


def test_three_steps_and_three_more_are_six(tmp_path, config, whole):
    parts = start(tmp_path, config, "parts", "--max-steps", 3)
    with open(parts.metrics, "a") as file:  # what a killed run had done after its checkpoint
        file.write('{"step": 4, "reward": 1.0}\n{"step": 5, "rew')
    invoke("--resume", parts.path, *CPU)
    assert outcome(parts) == outcome(whole)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def test_two_processes_and_a_resume_give_the_bits_of_one(tmp_path, config, whole):
    done = forked.start(
        "training.ppo.launch", *arguments_of(config, tmp_path, "two", "--max-steps", 3), ranks=2
    ).wait()
    assert done.returncode == 0, done.stderr
    two = run_of(tmp_path, "two")
    done = forked.start("training.ppo.launch", "--resume", two.path, *CPU, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert outcome(two) == outcome(whole)


def in_its_midst(folder: Path) -> bool:
    """Whether the run `cut` has done five of its steps."""
    return any('"step": 5' in p.read_text() for p in (folder / "exps").glob("*-cut/logs/metrics.jsonl"))


def ends_as(longer: RunFolder, folder: Path) -> None:
    """The run `cut` was cut, and goes on to the same end."""
    cut = run_of(folder, "cut")
    assert 0 < int(cut.latest_checkpoint().stem[4:]) < 16
    invoke("--resume", cut.path, *CPU)
    assert outcome(cut) == outcome(longer)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_or_killed_goes_on_to_the_same_end(tmp_path, config, longer, number, status):
    process = forked.start("training.ppo.launch", *arguments_of(config, tmp_path, "cut", *LONGER))
    done = process.signal_when(lambda: in_its_midst(tmp_path), number)
    assert done.returncode == status, done.stderr
    assert ("go on with --resume" in done.stdout) == (number == signal.SIGTERM)
    ends_as(longer, tmp_path)


def test_two_processes_that_are_killed_go_on_to_the_same_end_with_one(tmp_path, config, longer):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "training.ppo.launch",
    ]
    command += arguments_of(config, tmp_path, "cut", *LONGER)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    deadline = time.monotonic() + 120
    while not in_its_midst(tmp_path):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    for victim in (*psutil.Process(process.pid).children(recursive=True), process):
        victim.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    assert "go on with --resume" not in log.read_text()
    ends_as(longer, tmp_path)


def test_dry_run_loads_and_writes_nothing(tmp_path, config):
    out = invoke("--config", config, "--dry-run", "--output-root", tmp_path / "exps")
    assert (
        "8 images (4 groups of 2), 6 evaluations each (48 network rows, twice with guidance), serial depth 4"
        in out
    )
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    check(load_config(RDPOConfig, path))


@pytest.mark.parametrize(
    "override, told",
    [
        ("ppo.rlook=3", "rloo_k"),
        ("ppo.steps=many", "ppo.steps"),
        ("ppo.dirichlet_concentration=0", "ppo.dirichlet_concentration is 0.0, expected a number above 0"),
        ("ppo.rloo_k=3", "ppo.rollout_batch_size is 8, expected a multiple of ppo.rloo_k (3)"),
        ("ppo.minibatch_size=9", "ppo.minibatch_size is 9"),
        ("ppo.policy=lstm", "ppo.policy is 'lstm', expected one of table, mlp"),
        ("reward.type=beauty", "reward.type is 'beauty', expected one of"),
        ("reward.type=judge", "reward.type is 'judge', expected one of digits"),
        ("evaluation.rewards=[digits]", "evaluation.rewards holds 'digits'"),
        ("ppo.max_log_change=800", "ppo.max_log_change is 800.0, expected at most 20"),
        ("ppo.kl_target=0", "ppo.kl_target is 0.0"),
        ("model.guidance_rate=5", "model.guidance_rate is 5.0"),
        ("model.num_steps=9", "model.num_steps is 9"),
        ("model.schedule_type=logsnr", "made for 'discrete'"),
        ("data.predictor_snapshot=nowhere.pkl", "nowhere.pkl"),
        ("data.prompt_csv=nowhere.csv", "nowhere.csv"),
        ("logging.save_minutes=0", "logging.save_minutes is 0.0, expected a number above 0"),
        ("ppo.kl_coef=-1", "ppo.kl_coef is -1"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_written(tmp_path, config, override, told):
    assert told in refused("--config", config, "--output-root", tmp_path / "exps", "--override", override)
    assert not (tmp_path / "exps").exists()


def test_a_tableau_is_no_start(tmp_path, config):
    tableau = compile_tableau(Euler(), NODES)
    assert isinstance(tableau, Tableau)
    save_predictor(
        Predictor(tableau, Spec(backend="digits", solver="tableau"), NODES), tmp_path / "tableau.pkl"
    )
    assert "tableau" in refused(
        "--config", config, "--override", f"data.predictor_snapshot={tmp_path / 'tableau.pkl'}"
    )


def test_missing_weights_of_a_reward_are_one_line(tmp_path, config):
    told = refused(
        "--config",
        config,
        "--output-root",
        tmp_path / "exps",
        "--override",
        f"reward.weights_path={tmp_path / 'none'}",
    )
    assert "reward 'digits'" in told
    assert "hf download" in told


def test_plugin_tables_roll_out_as_they_are_exported(tmp_path, config):
    spec = Spec(**vars(SPEC) | {"max_order": 2, "afs": True})
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec, NODES), tmp_path / "start.pkl")
    run = start(tmp_path, config, "plugin", "--max-steps", 2)
    found = load_predictor(resolve_predictor_path(str(run.path)))
    assert (found.spec.max_order, found.spec.afs) == (2, True)


def test_a_resume_with_another_reward_is_refused(tmp_path, config):
    run = start(tmp_path, config, "whole", "--max-steps", 2)
    other = shutil.copytree(REWARD_FOLDER, tmp_path / "reward")
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    text = run.config.read_text()
    run.config.write_text(text.replace("weights_path: null", f"weights_path: {other}", 1))
    with pytest.raises(UserError, match="its rewards changed since its checkpoint"):
        invoke("--resume", run.path)


def test_no_unknown_option_and_no_secret_reaches_a_file(tmp_path, config):
    told = refused(
        "--config",
        config,
        "--output-root",
        tmp_path / "exps",
        "--override",
        "model.backend_options.colour=red",
    )
    assert "unknown option" in told
    assert not (tmp_path / "exps").exists()
    overrides = [
        "--override",
        f"data.predictor_snapshot={ROOT / 'exps/digits'}",
        "--override",
        "model.backend_options.token=hf_secret",
    ]
    arguments = arguments_of(config, tmp_path, "token", *overrides)
    assert "hf_secret" not in invoke(*arguments, "--dry-run") + invoke(*arguments, "--max-steps", 1)
    files = [p for p in (tmp_path / "exps").rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not any(b"hf_secret" in p.read_bytes() for p in files)


def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path, config):
    one = start(tmp_path, config, "one", "--max-steps", 2)  # in this process, which has one
    assert torch.get_num_threads() == 1
    command = [
        sys.executable,
        "-m",
        "training.ppo.launch",
        *arguments_of(config, tmp_path, "two", "--max-steps", 2),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert outcome(run_of(tmp_path, "two")) == outcome(one)
