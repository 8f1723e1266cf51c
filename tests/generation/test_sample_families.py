"""sample_sd3.py and sample_flux.py on tiny pipelines: files, defaults, contradictions, and what
--check says.
"""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import sample_flux
import sample_sd3
from solvers import Predictor, SolverTable, Spec, UserError, flowmatch, save_predictor

sys.path.insert(0, str(Path(__file__).parent / "backends"))
from tiny_flow import save_flux, save_sd3

COMMANDS = {"sd3": sample_sd3.main, "flux": sample_flux.main}
NODES = {"sd3": flowmatch(4, shift=3.0), "flux": flowmatch(4, mu=0.46)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "sd3": save_sd3(tmp_path_factory.mktemp("sd3")),
        "flux": save_flux(tmp_path_factory.mktemp("flux")),
    }


def invoke(name, *arguments):
    result = CliRunner().invoke(COMMANDS[name], [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def predictor_of(folder, name, **changes):
    config = {"max_sequence_length": 32}
    spec = Spec(
        **{
            "backend": name,
            "backend_config": config,
            "num_steps": 4,
            "schedule_type": "flowmatch",
            "guidance_rate": 3.5,
        }
        | changes
    )
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, NODES[name]), folder / f"{name}.pkl")
    return folder / f"{name}.pkl"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("max_order", [1, 2])
def test_epd_and_plugin_tables(tmp_path, models, name, max_order):
    path = predictor_of(tmp_path, name, max_order=max_order)
    arguments = [
        "--predictor",
        path,
        "--model-path",
        models[name],
        "--seeds",
        "0-2",
        "--prompt",
        "a cat",
        "--outdir",
        tmp_path / "out",
        "--grid",
    ]
    said = invoke(name, *arguments)
    assert "3 images in" in said
    assert ("on 2 rows" in said) == (name == "sd3")
    records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in records] == [0, 1, 2]
    assert {r["evaluations"] for r in records} == {9}
    assert (tmp_path / "out" / "grids").is_dir()


@pytest.mark.parametrize("name", COMMANDS)
def test_baselines_need_no_predictor_and_can_match_one(tmp_path, models, name):
    common = [
        "--model-path",
        models[name],
        "--seeds",
        "0",
        "--prompt",
        "a cat",
        "--backend-config",
        '{"max_sequence_length": 32}',
    ]
    assert "serial depth 4" in invoke(
        name, "--solver", "dpmpp", "--num-steps", 5, "--outdir", tmp_path / "a", *common
    )
    path = predictor_of(tmp_path, name)
    assert "serial depth 6" in invoke(
        name, "--solver", "unipc", "--steps-match", "--predictor", path, "--outdir", tmp_path / "b", *common
    )


def test_contradictions_name_both(tmp_path, models):
    path = predictor_of(tmp_path, "sd3", backend_config={"resolution": 64, "max_sequence_length": 32})
    with pytest.raises(UserError, match=r"resolution is 512, but .*sd3.pkl was made for 64"):
        invoke(
            "sd3", "--predictor", path, "--model-path", models["sd3"], "--prompt", "x", "--resolution", 512
        )
    with pytest.raises(UserError, match="was made for sd3, but this command is for flux"):
        invoke("flux", "--predictor", path, "--prompt", "x")


def test_check_says_what_is_missing(tmp_path, models, monkeypatch):
    monkeypatch.delenv("FLUX_MODEL_PATH", raising=False)
    monkeypatch.delenv("FLUX_ALLOW_REMOTE", raising=False)
    result = CliRunner().invoke(sample_flux.main, ["--check"])
    assert result.exit_code == 2
    assert "package torch: found" in result.output
    assert "weights black-forest-labs/FLUX.1-dev: missing; run 'hf download" in result.output
    monkeypatch.setenv("FLUX_MODEL_PATH", str(models["flux"]))
    result = CliRunner().invoke(sample_flux.main, ["--check"])
    assert result.exit_code == 0
    assert "missing" not in result.output
