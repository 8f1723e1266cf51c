"""The family of a model is that of the pipeline class in the model_index.json of its folder or hub id."""

import json

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from tiny import PROMPTS

import sample
from backends import BackendError
from backends.model_family import family_of_model
from common.errors import UserError
from digits import FOLDERS
from solvers import Predictor, SolverTable, Spec, save_predictor


def index(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the hub with one model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--acme--portraits"
    index(folder / "snapshots" / "a1", "StableDiffusion3Pipeline")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a1")


@pytest.mark.parametrize("family", FOLDERS)
def test_of_a_folder(family):
    assert family_of_model(str(FOLDERS[family])) == family


def test_of_a_hub_id(hub):
    assert family_of_model("acme/portraits") == "sd3"
    with pytest.raises(BackendError, match=r"neither a folder here nor a hub id.*--backend ldm\|") as caught:
        family_of_model("acme/landscapes")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "PixArtSigmaPipeline",
            "class 'PixArtSigmaPipeline' is not supported, expected one of Stable",
        ),
        ("PixArtSigmaPipeline", "takes a table as its scheduler: EPDScheduler, docs/diffusers.md"),
        (3, "expected JSON with _class_name"),
    ],
)
def test_another_class_is_one_line(tmp_path, name, words):
    with pytest.raises(BackendError, match=words) as caught:
        family_of_model(str(index(tmp_path, name)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["finetune.safetensors", "."])
def test_what_names_no_class_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match=r"; name it with --backend ldm\|"):
        family_of_model(model)


def run(*arguments):
    result = CliRunner().invoke(sample.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_sampling_finds_the_family_of_a_model(tmp_path, tiny_folder):
    """As a baseline, and with a table whose backbone is another one."""
    common = ("--backend", "auto", "--prompt", PROMPTS[0], "--seeds", 0, "--device", "cpu")
    euler = ("--solver", "euler", "--num-steps", 3)
    run(*common, *euler, "--model-path", tiny_folder, "--outdir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert record["backbone"] == f"ldm: {tiny_folder}"
    with pytest.raises(UserError, match="--backend auto finds the family of a model: give --model-path"):
        run(*common, *euler)
    spec = Spec(backend="sd3", num_steps=3, schedule_type="flowmatch", guidance_rate=1.0)
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec), tmp_path / "table.pkl")
    with pytest.raises(UserError, match=r"--backend is 'ldm', but .*table.pkl was made for 'sd3'"):
        run(*common, "--model-path", tiny_folder, "--predictor", tmp_path / "table.pkl")
