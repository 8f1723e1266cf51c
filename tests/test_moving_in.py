"""The published predictors on every command line, on pipelines of the real families' layouts and sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from published import NAMES, ROOT, SIZES, make_models
from published_writer import write_published
from released import PIXELS, write_released

import sample
import sample_flux
import sample_sd3
from evaluation.suite_runs import PRESETS, plan_suite, predictors_of
from solvers import Predictor, UserError, flowmatch, load_predictor, save_predictor
from solvers.predictor.__main__ import main as predictor_command
from training.ppo.launch import main as train

FAMILY = {
    "sd15": sample.main,
    "sd3-512": sample_sd3.main,
    "sd3-1024": sample_sd3.main,
    "flux": sample_flux.main,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downloads")
    write_released(folder)
    return folder / "exps"


def invoke(command, *arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def image_of(folder: Path) -> np.ndarray:
    (path,) = folder.rglob("000000.png")
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_models_own_size(tmp_path, models, exps, name):
    backbone = name.split("/")[0]
    common = [
        "--predictor",
        exps / name,
        "--model-path",
        models[backbone],
        "--prompt",
        "a cat",
        "--seeds",
        "0",
        "--device",
        "cpu",
    ]
    said = invoke(FAMILY[backbone], *common, "--dtype", "float32", "--outdir", tmp_path / "epd")
    depth, evaluations = (16, 24) if backbone == "flux" else (20, 30)
    assert f"epd from {exps / name}: serial depth {depth}, {evaluations} evaluations" in said
    assert image_of(tmp_path / "epd").shape == (SIZES[backbone],) * 2 + (3,)
    if "best" in name:
        said = invoke(
            FAMILY[backbone],
            *common,
            "--solver",
            "euler",
            "--steps-match",
            "--dtype",
            "float32",
            "--outdir",
            tmp_path / "euler",
        )
        assert f"euler: serial depth {depth}" in said
        assert image_of(tmp_path / "euler").shape == (SIZES[backbone],) * 2 + (3,)


def test_a_published_table_and_its_copy_in_the_own_format_are_one(tmp_path, models, exps):
    source = load_predictor(exps / "sd3-512/sd3-512-best.pkl")
    save_predictor(Predictor(source.table, source.spec, flowmatch(11, shift=3.0)), tmp_path / "own.pkl")
    for path in (exps / "sd3-512/sd3-512-best.pkl", tmp_path / "own.pkl"):
        arguments = [
            "--predictor",
            path,
            "--model-path",
            models["sd3-512"],
            "--prompt",
            "a cat",
            "--seeds",
            "0",
        ]
        invoke(sample_sd3.main, *arguments, "--outdir", tmp_path / path.stem)
    assert np.array_equal(image_of(tmp_path / "sd3-512-best"), image_of(tmp_path / "own"))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_plans_it(monkeypatch, exps, name):
    monkeypatch.chdir(ROOT)
    plan = plan_suite(name.split("/")[0], ["euler"], None, {"PREDICTOR": str(exps / name)})
    assert plan.runs[0].settings["depth"] == (16 if name.startswith("flux") else 20)


def refused_everywhere(path: Path) -> set[str]:
    """What each command line that takes a predictor says of one that it must refuse."""
    commands = [
        (sample.main, ["--predictor-path", path, "--prompt", "x"]),
        (sample.main, ["--predictor-path", path, "--prompt", "x", "--backend", "digits"]),
        (sample.main, ["--predictor-path", path, "--prompt", "x", "--solver", "euler", "--steps-match"]),
        (sample_sd3.main, ["--predictor", path, "--prompt", "x"]),
        (sample_flux.main, ["--predictor", path, "--prompt", "x"]),
        (
            train,
            [
                "--config",
                ROOT / "training/ppo/cfgs/digits.yaml",
                "--override",
                f"data.predictor_snapshot={path}",
                "--dry-run",
            ],
        ),
    ]
    said = set()
    for command, arguments in commands:
        with pytest.raises(UserError) as caught:
            invoke(command, *arguments)
        said.add(str(caught.value))
    with pytest.raises(UserError) as caught:
        plan_suite("sd15", ["euler"], None, {"PREDICTOR": str(path)})
    return said | {str(caught.value)}


@pytest.mark.parametrize("name", PIXELS[::9])
def test_a_table_of_another_backbone_is_refused_by_name(exps, name):
    (line,) = refused_everywhere(exps.parent / name)
    dataset = name.split("-")[1]
    assert f"{exps.parent / name} was made for dataset {dataset!r} and records no backbone" in line
    assert "velocity_from_denoiser" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", SIZES)
def test_evaluation_measures_the_best_and_the_distilled_table_of_the_downloads(monkeypatch, exps, name):
    monkeypatch.chdir(exps.parent)
    expected = {
        kind: f"exps/{name}/{name}-{kind}.pkl"
        for kind in ("best", "distilled")
        if (exps / name / f"{name}-{kind}.pkl").is_file()
    }
    assert predictors_of(PRESETS[name], {}) == expected
    assert next(iter(expected)) == "best", "what the others are compared with"


def test_evaluation_measures_the_start_table_where_there_is_no_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert predictors_of(PRESETS["sd15"], {}) == {"start": "exps/sd15/start.pkl"}


@pytest.mark.parametrize("text", ["sd3-512", "exps/sd3-512", "exps/sd3-512/sd3-512-best.pkl", "42"])
def test_file_folder_name_and_number_on_each_command_line(tmp_path, monkeypatch, exps, text):
    """What each command line finds first is the table; then it lacks weights, which is where this
    test ends.
    """
    shutil.copytree(exps / "sd3-512", tmp_path / "exps" / "sd3-512")
    shutil.copytree(exps / "sd3-512", tmp_path / "exps" / "00042-mine")
    monkeypatch.chdir(tmp_path)
    nothing = ["--model-path", "/no/such/model", "--prompt", "x"]
    for command, option in ((sample.main, "--predictor_path"), (sample_sd3.main, "--predictor")):
        with pytest.raises(UserError, match="'/no/such/model' not found"):
            invoke(command, option, text, *nothing)
    overrides = [
        "--override",
        f"data.predictor_snapshot={text}",
        "--override",
        "reward.type=digits",
        "--override",
        "reward.weights_path=null",
    ]
    said = invoke(train, "--config", ROOT / "training/ppo/cfgs/sd3_512.yaml", "--dry-run", *overrides)
    assert "predictor_snapshot: exps/" in said
    assert plan_suite("sd3-512", [], None, {"PREDICTOR": text}).runs[0].settings["depth"] == 20


def test_what_a_file_carries_that_is_unknown_here_is_one_note(tmp_path):
    config = {"resolution": 512, "vae_tiling": True}
    raw = {"r_params": torch.zeros(3, 2), "weight_s": torch.zeros(3, 2)}
    path = write_published(tmp_path / "p.pkl", raw, backend="ldm", backend_config=config)
    said = invoke(
        sample.main,
        "--predictor",
        path,
        "--model-path",
        ROOT / "digits/sd",
        "--prompt",
        "x",
        "--seeds",
        "0",
        "--outdir",
        tmp_path,
    )
    assert said.count("note: ") == 2
    assert f"note: {path}: backend_config.vae_tiling: no such option here, left out" in said
    assert f"note: {path}: a start table, in which nothing was learned yet; distil first" in said


@pytest.mark.parametrize("name", [*NAMES, *(name.removeprefix("exps/") for name in PIXELS)])
def test_show_and_convert(tmp_path, exps, name):
    shown = invoke(predictor_command, "show", exps / name)
    assert f"{exps / name}\n" in shown
    assert ("nothing was learned yet" in shown) == name.endswith("-start.pkl")
    invoke(predictor_command, "convert", exps / name, tmp_path / "own.pkl")
    again = invoke(predictor_command, "show", tmp_path / "own.pkl")
    assert again.split("dataset_name", 1)[1] == shown.split("dataset_name", 1)[1]
