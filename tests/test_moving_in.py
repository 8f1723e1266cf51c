"""The published predictors on every command line, on pipelines of the real families' layouts and sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from published import NAMES, ROOT, SIZES
from published_writer import write_published
from released import PIXELS

import sample
import sample_flux
import sample_sd3
from evaluation.suite_runs import PRESETS, plan_suite, predictors_of
from solvers import Predictor, UserError, flowmatch, load_predictor, save_predictor
from solvers.predictor.__main__ import main as predictor_command
from training.ppo.launch import main as train

from .generation.command import invoke, pixels, refused

FAMILY = {
    "sd15": sample.main,
    "sd3-512": sample_sd3.main,
    "sd3-1024": sample_sd3.main,
    "flux": sample_flux.main,
}


def image_of(folder: Path) -> np.ndarray:
    """The only image of a folder."""
    (image,) = pixels(folder).values()
    return image


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_the_models_own_size(tmp_path, models, downloads, name):
    backbone = name.split("/")[0]
    shape = (SIZES[backbone],) * 2 + (3,)
    run = f"--predictor {downloads / name} --model-path {models[backbone]} --prompt 'a cat' --seeds 0"
    run += f" --device cpu --dtype float32 --outdir {tmp_path}"
    text = invoke(f"{run}/epd", command=FAMILY[backbone])
    depth, evaluations = (16, 24) if backbone == "flux" else (20, 30)
    assert f"epd from {downloads / name}: serial depth {depth}, {evaluations} evaluations" in text
    assert image_of(tmp_path / "epd").shape == shape
    if "best" in name:
        text = invoke(f"{run}/euler --solver euler --steps-match", command=FAMILY[backbone])
        assert f"euler: serial depth {depth}" in text
        assert image_of(tmp_path / "euler").shape == shape


def test_a_published_table_and_its_copy_in_the_own_format_are_one(tmp_path, models, downloads):
    published, own = downloads / "sd3-512/sd3-512-best.pkl", tmp_path / "own.pkl"
    source = load_predictor(published)
    save_predictor(Predictor(source.table, source.spec, flowmatch(11, shift=3.0)), own)
    for path in (published, own):
        run = f"--predictor {path} --model-path {models['sd3-512']} --prompt 'a cat' --seeds 0"
        invoke(run, "--outdir", tmp_path / path.stem, command=sample_sd3.main)
    assert np.array_equal(image_of(tmp_path / published.stem), image_of(tmp_path / own.stem))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_plans_it(monkeypatch, downloads, name):
    monkeypatch.chdir(ROOT)
    plan = plan_suite(name.split("/")[0], ["euler"], None, {"PREDICTOR": str(downloads / name)})
    assert plan.runs[0].settings["depth"] == (16 if name.startswith("flux") else 20)


def refusals(path: Path) -> set[str]:
    """What each command line that takes a predictor prints of one that it must refuse."""
    lines = {
        refused(f"--predictor-path {path} --prompt x {more}")
        for more in ("", "--backend digits", "--solver euler --steps-match")
    }
    lines |= {
        refused(f"--predictor {path} --prompt x", command=command)
        for command in (sample_sd3.main, sample_flux.main)
    }
    config = f"--config {ROOT}/training/ppo/cfgs/digits.yaml --dry-run"
    lines.add(refused(config, "--override", f"data.predictor_snapshot={path}", command=train))
    with pytest.raises(UserError) as error:
        plan_suite("sd15", ["euler"], None, {"PREDICTOR": str(path)})
    return lines | {str(error.value)}


@pytest.mark.parametrize("name", PIXELS[::9])
def test_a_table_of_another_backbone_is_refused_by_name(downloads, name):
    (line,) = refusals(downloads.parent / name)
    dataset = name.split("-")[1]
    assert f"{downloads.parent / name} was made for dataset {dataset!r} and records no backbone" in line
    assert "velocity_from_denoiser" in line


@pytest.mark.parametrize("name", SIZES)
def test_evaluation_measures_the_best_and_the_distilled_table_of_the_downloads(monkeypatch, downloads, name):
    monkeypatch.chdir(downloads.parent)
    expected = {
        kind: f"exps/{name}/{name}-{kind}.pkl"
        for kind in ("best", "distilled")
        if (downloads / name / f"{name}-{kind}.pkl").is_file()
    }
    assert predictors_of(PRESETS[name], {}) == expected
    assert next(iter(expected)) == "best", "what the others are compared with"


def test_evaluation_measures_the_start_table_where_there_is_no_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert predictors_of(PRESETS["sd15"], {}) == {"start": "exps/sd15/start.pkl"}


@pytest.mark.parametrize("text", ["sd3-512", "exps/sd3-512", "exps/sd3-512/sd3-512-best.pkl", "42"])
def test_file_folder_name_and_number_on_each_command_line(tmp_path, monkeypatch, downloads, text):
    """Each command line first looks for the table; then it lacks weights, which is where this test ends."""
    shutil.copytree(downloads / "sd3-512", tmp_path / "exps" / "sd3-512")
    shutil.copytree(downloads / "sd3-512", tmp_path / "exps" / "00042-own")
    monkeypatch.chdir(tmp_path)
    for command in (sample.main, sample_sd3.main):
        line = refused(f"--predictor {text} --model-path /no/such/model --prompt x", command=command)
        assert "'/no/such/model' not found" in line
    overrides = (f"data.predictor_snapshot={text}", "reward.type=digits", "reward.weights_path=null")
    options = [word for override in overrides for word in ("--override", override)]
    config = f"--config {ROOT}/training/ppo/cfgs/sd3_512.yaml --dry-run"
    assert "predictor_snapshot: exps/" in invoke(config, *options, command=train)
    assert plan_suite("sd3-512", [], None, {"PREDICTOR": text}).runs[0].settings["depth"] == 20


def test_what_a_file_carries_that_is_unknown_here_is_one_note(tmp_path):
    config = {"resolution": 512, "vae_tiling": True}
    raw = {"r_params": torch.zeros(3, 2), "weight_s": torch.zeros(3, 2)}
    path = write_published(tmp_path / "p.pkl", raw, backend="ldm", backend_config=config)
    run = f"--predictor {path} --model-path {ROOT}/digits/sd --prompt x --seeds 0 --outdir {tmp_path}"
    text = invoke(run)
    assert text.count("note: ") == 2
    assert f"note: {path}: backend_config.vae_tiling: no such option here, left out" in text
    assert f"note: {path}: a start table, in which nothing was learned yet; distil first" in text


@pytest.mark.parametrize("name", [*NAMES, *(name.removeprefix("exps/") for name in PIXELS)])
def test_show_and_convert(tmp_path, downloads, name):
    path, own = downloads / name, tmp_path / "own.pkl"
    shown = invoke("show", path, command=predictor_command)
    assert f"{path}\n" in shown
    assert ("nothing was learned yet" in shown) == name.endswith("-start.pkl")
    invoke("convert", path, own, command=predictor_command)
    again = invoke("show", own, command=predictor_command)
    assert again.split("dataset_name", 1)[1] == shown.split("dataset_name", 1)[1]
