"""Rectangular images: with a table where its nodes are those of the size, else one line."""

import sys
from pathlib import Path

import pytest
import torch

import sample_flux
import sample_sd3
from common.resolution import image_size, resolution_of
from solvers import (
    Predictor,
    PredictorError,
    SolverTable,
    Spec,
    UserError,
    dynamic_shift,
    flowmatch,
    save_predictor,
)

from .command import invoke, manifest, refused

sys.path.insert(0, str(Path(__file__).parents[1] / "backends"))
from tiny_flow import save_flux, save_sd3
from tiny_sdxl import save_sdxl


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    saves = {"sd3": save_sd3, "flux": save_flux, "sdxl": save_sdxl}
    return {name: save(folder / name) for name, save in saves.items()}


def table_of(folder: Path, family: str, resolution: int | str) -> Path:
    """A table of a family at a resolution."""
    tokens = (image_size(resolution)[0] // 16) * (image_size(resolution)[1] // 16)
    shift = {"mu": dynamic_shift(tokens)} if family == "flux" else {"shift": 3.0}
    options = {"max_sequence_length": 32, "resolution": resolution}
    spec = Spec(
        backend=family, backend_config=options, num_steps=3, guidance_rate=3.5, schedule_type="flowmatch"
    )
    spec = spec.overridden({f"flowmatch_{key}": value for key, value in shift.items()})
    predictor = Predictor(SolverTable.uniform(2, 2), spec, flowmatch(3, **shift))
    save_predictor(predictor, folder / f"{family}.pkl")
    return folder / f"{family}.pkl"


def size_of(folder: Path) -> tuple[int, int]:
    from PIL import Image

    return Image.open(folder / manifest(folder)[0]["file"]).size


@pytest.mark.parametrize(
    "text, size", [("1024", (1024, 1024)), ("1024x768", (1024, 768)), ("64x64", (64, 64))]
)
def test_a_resolution_is_a_side_or_width_and_height(text, size):
    value = int(text) if text.isdigit() else text
    assert image_size(value) == size
    assert image_size(resolution_of(*size)) == size


@pytest.mark.parametrize("text", ["1024x", "x", "10by10", "-1x10", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match="expected pixels a side such as 1024, or WIDTHxHEIGHT"):
        image_size(text)
    assert "resolution" in refused("--prompt x --resolution", text)


def test_a_baseline_at_a_rectangle(tmp_path, models):
    run = f"--backend auto --model-path {models['sdxl']} --solver euler --num-steps 3 --prompt x --seeds 0"
    invoke(f"{run} --resolution 96x64 --outdir {tmp_path}")
    assert size_of(tmp_path) == (96, 64)
    assert manifest(tmp_path)[0]["config"]["resolution"] == "96x64"


def test_a_table_whose_nodes_do_not_depend_on_the_size(tmp_path, models):
    path = table_of(tmp_path, "sd3", 64)
    run = f"--predictor {path} --model-path {models['sd3']} --seeds 0 --prompt x --outdir {tmp_path / 'out'}"
    text = invoke(f"{run} --resolution 96x64", command=sample_sd3.main)
    assert "learned at resolution 64, used at 96x64, whose nodes are the same" in text
    assert size_of(tmp_path / "out") == (96, 64)


def test_a_table_of_flux_fits_the_sizes_of_as_many_tokens(tmp_path, models):
    path = table_of(tmp_path, "flux", 64)
    run = f"--predictor {path} --model-path {models['flux']} --seeds 0 --prompt x --outdir {tmp_path / 'out'}"
    invoke(f"{run} --resolution 128x32", command=sample_flux.main)
    assert size_of(tmp_path / "out") == (128, 32)
    line = refused(f"{run} --resolution 96x64", command=sample_flux.main)
    mu = f"where the time shift mu is {dynamic_shift(16):.3g}; at 96x64 it is {dynamic_shift(24):.3g}"
    assert f"resolution 96x64: the nodes are those of resolution 64, {mu}" in line
    assert "learn a table there, or use a baseline" in line


def test_the_published_shift_of_flux_is_that_of_1024_pixels():
    spec = Spec(backend="flux", backend_config={"resolution": 1024}, flowmatch_mu=1.15)
    with pytest.raises(PredictorError, match=r"mu is 1\.15; at 1024x768 it is 0\.977"):
        spec.merged({"backend_config": {"resolution": "1024x768"}}, "exps/flux/start.pkl")
    merged = spec.merged({"backend_config": {"resolution": "2048x512"}}, "exps/flux/start.pkl")
    assert merged.backend_config["resolution"] == "2048x512"


def test_two_squares_contradict_each_other_still():
    spec = Spec(backend="sd3", backend_config={"resolution": 1024})
    with pytest.raises(PredictorError, match="resolution is 512, but a file was made for 1024"):
        spec.merged({"backend_config": {"resolution": 512}}, "a file")


def test_images_of_a_square_are_those_of_the_same_rectangle(models):
    from backends import load_backend

    latents = []
    for options in ({}, {"resolution": "64x64"}):
        config = {"model_name_or_path": str(models["sd3"]), "max_sequence_length": 32} | options
        backend = load_backend(Spec(backend="sd3", backend_config=config), "cpu")
        with torch.inference_mode():
            x = backend.initial_latents([0], 1.0)
            latents.append(backend.velocity(backend.encode(["x"], 1))(x, torch.tensor(0.5)))
    assert torch.equal(*latents)
