"""The committed digits backbone and its judge."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from digits import FOLDER
from digits.data import (
    ALL_LABELS,
    COLOURS,
    HELD_OUT_LABELS,
    WEIGHTS,
    Label,
    caption,
    enlarge,
    evaluation_prompts,
    paint,
    parse,
)
from digits.drawings import held_out_drawings
from digits.judge import FOLDER as JUDGE_FOLDER
from digits.judge import Judge, frechet_distance, moments, sqrt_psd
from generation.generate import Sampler
from solvers import DPM2, Spec


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.fixture(scope="module")
def real():
    return held_out_drawings()


@pytest.fixture(scope="module")
def sampled(digits):
    """48 guided images and what was asked for."""
    prompts = evaluation_prompts(48, [c for c in ALL_LABELS if c not in HELD_OUT_LABELS])
    sampler = Sampler(digits, DPM2(), "dpm2", digits.sigmas(Spec(num_steps=13)), 7.5)
    return sampler.images(prompts, range(48)), [parse(p) for p in prompts]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_folder_is_a_stock_pipeline_and_small():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    image = pipe("a bold red handwritten three", **options).images
    assert image.shape == (1, 32, 32, 3)
    assert np.isfinite(image).all()
    sizes = [
        file.stat().st_size
        for folder in (FOLDER, JUDGE_FOLDER)
        for file in folder.rglob("*")
        if file.is_file()
    ]
    assert sum(sizes) < 4e6
    assert not {file.suffix for file in FOLDER.rglob("*") if file.is_file()} - {".json", ".safetensors"}


def test_the_noise_schedule_is_that_of_stable_diffusion(digits):
    config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    expected |= {"prediction_type": "epsilon", "steps_offset": 1, "trained_betas": None}
    assert config.items() >= expected.items()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)
    assert digits.sigma_max == pytest.approx(((1 - alpha[-1]) / alpha[-1]) ** 0.5, rel=1e-4)
    assert digits.sigma_min == pytest.approx(((1 - alpha[0]) / alpha[0]) ** 0.5, rel=1e-4)


@pytest.fixture(scope="module")
def verdict(judge, real):
    """Of all held-out drawings."""
    return judge(*real)


def test_the_judge_reads_held_out_scans(verdict, real):
    """Scans split off and painted here."""
    raw = load_digits()
    _, scans, _, digit = train_test_split(
        raw.images, raw.target, test_size=0.2, stratify=raw.target, random_state=0
    )
    grey, n = enlarge(torch.from_numpy(scans).float() / 16), len(scans)
    images, labels, labels_here = *real, []
    for i, (colour, weight) in enumerate(product(range(len(COLOURS)), range(len(WEIGHTS)))):
        painted = paint(grey, torch.full((n,), colour), torch.full((n,), weight))
        assert torch.equal(painted, images[i * n : (i + 1) * n])
        labels_here += [Label(d, colour, weight) for d in digit.tolist()]
    assert labels == labels_here
    assert verdict.digit.double().mean() >= 0.98
    assert verdict.colour.all()
    assert verdict.weight.double().mean() > 0.75


def test_a_verdict_compares_with_what_was_asked_for(judge, real):
    images, labels = real[0][::40], real[1][::40]
    assert len(images) == 162
    asked = [parse(caption(c)) for c in labels]
    verdict = judge(images, asked)
    assert verdict.digit_and_colour.double().mean() > 0.95
    other_ink = judge(images, [type(c)(c.digit, (c.colour + 1) % 6) for c in labels])
    assert torch.equal(other_ink.digit, verdict.digit)
    assert not other_ink.digit_and_colour.any()
    wrong = judge(
        images, [type(c)((c.digit + 1) % 10, (c.colour + 1) % 6, (c.weight + 1) % 3) for c in labels]
    )
    assert wrong.digit.double().mean() < 0.05
    assert wrong.colour.double().mean() == 0
    assert not (wrong.digit & verdict.digit).any()
    left_open = judge(images, [type(c)(c.digit) for c in labels])
    assert left_open.colour.all()
    assert left_open.weight.all()
    assert torch.equal(left_open.digit, verdict.digit)


def test_guided_samples_are_what_was_asked_for(judge, sampled):
    images, labels = sampled
    assert images.shape == (48, 3, 32, 32)
    assert judge(images, labels).digit_and_colour.double().mean() >= 0.95


def test_other_labels_would_be_wrong(judge, sampled):
    images, labels = sampled
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    assert judge(images, [labels[i] for i in order]).digit_and_colour.double().mean() < 0.4


def test_samples_are_nearer_to_real_digits_than_noise_is(judge, sampled, real):
    noise = torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distance = {
        "real": judge.frechet(judge(real[0][::135], real[1][::135]).features),
        "sampled": judge.frechet(judge(*sampled).features),
        "noise": judge.frechet(judge(noise, sampled[1]).features),
    }
    assert distance["sampled"] < 3 * distance["real"]
    assert distance["noise"] > 2 * distance["sampled"]


def test_the_stored_moments_are_those_of_the_held_out_drawings(judge, real, verdict):
    assert verdict.features.shape == (len(real[0]), 64)
    assert 0 <= judge.frechet(verdict.features) < 1e-3


def test_frechet_distance_of_equal_gaussians():
    mean, cov = moments(normal(500, 6))
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-10


def test_frechet_distance_of_shifted_gaussians():
    mean, cov = moments(normal(500, 6))
    shift = normal(6, seed=1)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(
        shift.square().sum().item(), rel=1e-9
    )


def test_frechet_distance_of_diagonal_covariances():
    """sum (mean_a - mean_b)^2 + (std_a - std_b)^2; and in any basis."""
    mean_a, mean_b = normal(2, 6)
    std_a, std_b = normal(2, 6, seed=1).abs()
    expected = ((mean_a - mean_b).square() + (std_a - std_b).square()).sum().item()
    cov_a, cov_b = std_a.square().diag(), std_b.square().diag()
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)
    q = torch.linalg.qr(normal(6, 6, seed=2)).Q
    turned = frechet_distance(q @ mean_a, q @ cov_a @ q.T, q @ mean_b, q @ cov_b @ q.T)
    assert turned == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_takes_singular_covariances():
    a, b = moments(normal(4, 6)), moments(normal(300, 6, seed=1) * 2)
    assert torch.linalg.matrix_rank(a[1]) == 3
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-6)


def test_square_root_and_moments():
    features = normal(400, 5)
    mean, cov = moments(features.float())
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(cov.numpy(), np.cov(features.numpy(), rowvar=False), atol=1e-6)
    root = sqrt_psd(cov)
    torch.testing.assert_close(root @ root, cov, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)


def test_no_configuration_names_a_folder_of_the_machine_it_was_made_on():
    texts = {path: path.read_text() for path in FOLDER.parent.rglob("*.json")}
    assert texts
    assert not [path for path, text in texts.items() if "_name_or_path" in text]
