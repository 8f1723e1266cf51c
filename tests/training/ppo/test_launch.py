"""The RDPO command line: what a run writes, what is exported, one-line errors, secrets."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from digits import REWARD_FOLDER
from solvers import (
    Predictor,
    SolverTable,
    Spec,
    UserError,
    compile_tableau,
    load_predictor,
    resolve_predictor_path,
    save_predictor,
)
from solvers.single_step import Euler
from training.config import load_config
from training.ppo import export_epd_predictor
from training.ppo.checks import check
from training.ppo.config import RDPOConfig

from ..runs import RDPO, RDPO_NODES, RDPO_SPEC, ROOT, error_of, invoke


def best_of(run) -> Predictor:
    """The best predictor of a run."""
    return load_predictor(resolve_predictor_path(str(run.path)))


def test_a_run_writes_all_it_promises(whole_rdpo):
    run = whole_rdpo
    records = [json.loads(line, parse_constant=pytest.fail) for line in run.metrics.read_text().splitlines()]
    steps = [r for r in records if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    diagnostics = {"approx_kl", "clipfrac", "ratio", "entropy", "kl", "concentration_pos", "drift_r"}
    assert {*diagnostics, "reward_within_std", "reward_between_std"} <= steps[0].keys()
    assert steps[0]["kl"] >= 0
    evaluations = [r for r in records if "table" in r]
    assert [r["step"] for r in evaluations] == [0, 2, 4, 6]
    assert evaluations[0]["gain_digits"] == 0
    assert evaluations[-1]["gain_digits_halfwidth"] > 0
    assert list((run.path / "logs").glob("events.*"))
    seconds = [json.loads(line) for line in (run.path / "logs" / "seconds.jsonl").read_text().splitlines()]
    assert seconds[1].keys() == {"step", "encode", "sample", "decode", "reward", "update"}
    assert all(value > 0 for record in seconds[1:] for value in record.values())
    predictor = best_of(run)
    assert predictor.provenance["kind"] == "rdpo"
    assert torch.equal(predictor.sigmas, RDPO_NODES)
    best = max(evaluations, key=lambda r: r["gain_digits"])
    assert predictor.table.r.tolist() == best["table"]["r"]  # what is exported is what was measured


def test_export_again_gives_the_same_table(tmp_path, whole_rdpo):
    run, main = whole_rdpo, export_epd_predictor.main
    invoke(main, run.path, "--output-dir", tmp_path / "out", "--device", "cpu")
    best = load_predictor(run.export / "network-snapshot-export-best.pkl")
    again = load_predictor(resolve_predictor_path(str(tmp_path / "out")))
    assert torch.equal(again.table.r, best.table.r)
    assert torch.equal(again.table.w, best.table.w)
    assert again.spec == best.spec
    manifest = json.loads(next((tmp_path / "out").glob("export-manifest-*.json")).read_text())
    assert all(r["step"] == best.provenance["step"] for r in manifest["metrics"])
    options = ("--checkpoint", "step000004.pt", "--output-dir", tmp_path / "four", "--no-manifest")
    invoke(main, run.path, *options)
    assert [p.name for p in (tmp_path / "four").iterdir()] == ["network-snapshot-export-step000004.pkl"]
    assert "step000004.pt" in error_of(main, run.path, "--checkpoint", "x.pt")
    assert "device 'cuda:99' cannot be used" in error_of(main, run.path, "--device", "cuda:99")


def test_dry_run_loads_and_writes_nothing(tmp_path):
    out = invoke(RDPO.main, *RDPO.arguments(tmp_path, "dry", more=("--dry-run",)))
    assert (
        "8 images (4 groups of 2), 6 evaluations each (48 network rows, twice with guidance), serial depth 4"
        in out
    )
    assert not (tmp_path / "exps").exists()


@pytest.mark.parametrize("path", sorted(RDPO.configs.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid(path):
    check(load_config(RDPOConfig, path))


@pytest.mark.parametrize(
    "override, message",
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
        ("model.schedule_type=logsnr", "made for 'polynomial'"),
        ("data.predictor_snapshot=nowhere.pkl", "nowhere.pkl"),
        ("data.prompt_csv=nowhere.csv", "nowhere.csv"),
        ("logging.save_minutes=0", "logging.save_minutes is 0.0, expected a number above 0"),
        ("ppo.kl_coef=-1", "ppo.kl_coef is -1"),
        ("model.backend_options.colour=red", "unknown option"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_written(tmp_path, override, message):
    assert message in RDPO.error(*RDPO.arguments(tmp_path, "wrong", override))
    assert not (tmp_path / "exps").exists()


def test_a_tableau_is_no_start(tmp_path):
    tableau, path = compile_tableau(Euler(), RDPO_NODES), tmp_path / "tableau.pkl"
    save_predictor(Predictor(tableau, Spec(backend="gaussian", solver="tableau"), RDPO_NODES), path)
    assert "tableau" in RDPO.error(*RDPO.arguments(tmp_path, "wrong", f"data.predictor_snapshot={path}"))


def test_missing_weights_of_a_reward_are_one_line(tmp_path):
    message = RDPO.error(*RDPO.arguments(tmp_path, "wrong", f"reward.weights_path={tmp_path / 'none'}"))
    assert "reward 'digits'" in message
    assert "hf download" in message


OWN_REWARD = """
import torch

from rewards import Reward


class Brightness(Reward):
    name, version = "brightness", "1"

    def __init__(self, device):
        self.device = device

    def score(self, images, prompts):
        return images.mean((1, 2, 3))
"""


def test_a_reward_of_the_users_own_is_trained_on_where_the_configuration_names_it(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    run = RDPO.start(tmp_path, "own", "reward.type=own_reward:Brightness", "ppo.steps=1")
    assert "gain_brightness" in run.records()[-1]
    assert best_of(run).provenance["reward"]["name"] == "brightness"


def test_plugin_tables_roll_out_as_they_are_exported(tmp_path):
    RDPO.write_config(tmp_path)
    spec = Spec(**vars(RDPO_SPEC) | {"max_order": 2, "afs": True})
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec, RDPO_NODES), tmp_path / "start.pkl")
    best = best_of(RDPO.start(tmp_path, "plugin", more=("--max-steps", 1)))
    assert (best.spec.max_order, best.spec.afs) == (2, True)


def test_a_resume_with_another_reward_is_refused(tmp_path):
    run = RDPO.start(tmp_path, "whole", more=("--max-steps", 1))
    other = shutil.copytree(REWARD_FOLDER, tmp_path / "reward")
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    text = run.config.read_text()
    run.config.write_text(text.replace("weights_path: null", f"weights_path: {other}", 1))
    with pytest.raises(UserError, match=r"reward.weights_path is .* but its checkpoint was made with None"):
        invoke(RDPO.main, "--resume", run.path)


def test_a_run_on_the_digits_measures_the_judge_and_writes_no_secret(tmp_path):
    settings = (
        f"data.predictor_snapshot={ROOT / 'exps/digits'}",
        "data.prompt_csv=null",
        "evaluation.rewards=[judge]",
        "model.backend_options.token=hf_secret",
        "ppo.steps=1",
    )
    dry = invoke(RDPO.main, *RDPO.arguments(tmp_path, "token", *settings, more=("--dry-run",)))
    assert "hf_secret" not in dry + invoke(RDPO.main, *RDPO.arguments(tmp_path, "token", *settings))
    run = RDPO.run_of(tmp_path, "token")
    assert run.records()[0]["gain_judge"] == 0
    files = [p for p in run.path.rglob("*") if p.is_file()]
    assert len(files) > 5
    assert not any(b"hf_secret" in p.read_bytes() for p in files)
