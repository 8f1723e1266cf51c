"""sample_sd3.py and sample_flux.py on tiny pipelines: files, defaults, contradictions, and what
--check says.
"""

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import sample_flux
import sample_sd3
from solvers import Predictor, SolverTable, Spec, flowmatch, save_predictor

from .command import invoke, manifest, refused

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from tiny_flow import save_flux, save_sd3

COMMANDS = {"sd3": sample_sd3.main, "flux": sample_flux.main}
NODES = {"sd3": flowmatch(4, shift=3.0), "flux": flowmatch(4, mu=0.46)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"sd3": save_sd3(folder / "sd3"), "flux": save_flux(folder / "flux")}


def predictor_of(folder: Path, name: str, **changes) -> Path:
    """A start table of a family."""
    spec = Spec(backend=name, backend_config={"max_sequence_length": 32}, num_steps=4, guidance_rate=3.5)
    spec = spec.overridden({"schedule_type": "flowmatch"} | changes)
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, NODES[name]), folder / f"{name}.pkl")
    return folder / f"{name}.pkl"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("max_order", [1, 2])
def test_epd_and_plugin_tables(tmp_path, models, name, max_order):
    path, out = predictor_of(tmp_path, name, max_order=max_order), tmp_path / "out"
    run = f"--predictor {path} --model-path {models[name]} --seeds 0-2 --prompt 'a cat' --grid"
    text = invoke(run, "--outdir", out, command=COMMANDS[name])
    assert "3 images in" in text
    assert ("on 2 rows" in text) == (name == "sd3")
    records = manifest(out)
    assert [r["seed"] for r in records] == [0, 1, 2]
    assert {r["evaluations"] for r in records} == {9}
    assert (out / "grids").is_dir()


@pytest.mark.parametrize("name", COMMANDS)
def test_baselines_need_no_predictor_and_can_match_one(tmp_path, models, name):
    short = ("--backend-config", '{"max_sequence_length": 32}')
    run = f"--model-path {models[name]} --seeds 0 --prompt 'a cat' --outdir {tmp_path}"
    text = invoke(f"{run}/a --solver dpmpp --num-steps 5", *short, command=COMMANDS[name])
    assert "serial depth 4" in text
    path = predictor_of(tmp_path, name)
    matched = f"{run}/b --solver unipc --steps-match --predictor {path}"
    assert "serial depth 6" in invoke(matched, *short, command=COMMANDS[name])


def test_contradictions_name_both(tmp_path, models):
    path = predictor_of(tmp_path, "sd3", backend_config={"resolution": 64, "max_sequence_length": 32})
    run = f"--predictor {path} --prompt x"
    line = refused(f"{run} --model-path {models['sd3']} --resolution 512", command=sample_sd3.main)
    assert "resolution is 512, but" in line
    assert "sd3.pkl was made for 64" in line
    line = refused(run, command=sample_flux.main)
    assert "was made for sd3, but this command is for flux" in line


def test_check_lists_what_is_missing(models, monkeypatch):
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
