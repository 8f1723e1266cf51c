"""Stable Diffusion 3.5, FLUX.1-schnell and rectangular images equal diffusers' own pipelines; FLUX.1-Krea-dev
has the layout of FLUX.1-dev.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from tiny_flow import SD35, save_flux, save_sd3

from backends import BackendError, initial_noise, load_backend
from generation.generate import Sampler
from solvers import BASELINES, Euler, Spec, dynamic_shift, flowmatch, sample

PROMPTS = ["a photo of the cat", "dog, 8k!", ""]
STEPS, LENGTH = 6, 32
CASES = {
    "sd3.5 medium": (save_sd3, SD35, {}),
    "sd3.5 large": (save_sd3, {"qk_norm": "rms_norm"}, {}),
    "sd3 rectangle": (save_sd3, {}, {"resolution": "96x64"}),
    "flux schnell": (save_flux, {"schnell": True}, {}),
    "flux rectangle": (save_flux, {}, {"resolution": "96x64"}),
}
FLUX = ("flux schnell", "flux rectangle")
GUIDED = [name for name in CASES if name != "flux schnell"]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Our backend and diffusers' pipeline of a case."""

    @functools.cache
    def pair(case):
        save, arguments, options = CASES[case]
        folder = save(tmp_path_factory.mktemp("flow"), **arguments)
        pipe = (FluxPipeline if save is save_flux else StableDiffusion3Pipeline).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return load(folder, case, **options), pipe

    return pair


def load(folder, case, dtype=None, **options):
    options = {"model_name_or_path": str(folder), "max_sequence_length": LENGTH} | options
    name = "flux" if case.startswith("flux") else "sd3"
    return load_backend(Spec(backend=name, backend_config=options), "cpu", dtype)


def nodes_of(backend, pipe):
    """The pipeline's own nodes, of which the last is 0."""
    scheduler = pipe.scheduler
    if isinstance(pipe, StableDiffusion3Pipeline):
        scheduler.set_timesteps(STEPS)
    else:
        mu = {"mu": backend.flow_mu} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), **mu)
    return scheduler.sigmas.double()


def diffusers_images(backend, pipe, prompts, guidance, output="latent"):
    channels, height, width = backend.latent_shape
    noise = initial_noise(range(len(prompts)), backend.latent_shape)
    flux = isinstance(pipe, FluxPipeline)
    images = pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=FluxPipeline._pack_latents(noise, len(noise), channels, height, width) if flux else noise,
        height=8 * height,
        width=8 * width,
        max_sequence_length=LENGTH,
        output_type=output,
    ).images
    if flux and output == "latent":
        return FluxPipeline._unpack_latents(images, 8 * height, 8 * width, 8)
    return images


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case, guidance", [*((c, g) for c in GUIDED for g in (1, 4.5)), ("flux schnell", 1)])
def test_latents(pair_of, case, guidance, batch):
    backend, pipe = pair_of(case)
    nodes = nodes_of(backend, pipe)
    latents = Sampler(backend, Euler(), "euler", nodes, guidance).latents(PROMPTS[:batch], range(batch))
    expected = diffusers_images(backend, pipe, PROMPTS[:batch], guidance)
    assert expected.std() > 0.1
    assert difference(latents, expected) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_images(pair_of, case):
    backend, pipe = pair_of(case)
    guidance = backend.default_guidance
    images = Sampler(backend, Euler(), "euler", nodes_of(backend, pipe), guidance).images(PROMPTS, range(3))
    assert difference(images, diffusers_images(backend, pipe, PROMPTS, guidance, "pt")) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_equality_would_miss_shows(pair_of, case):
    """The wrong time scale, sign and shift each move the result by far more than the bound."""
    backend, pipe = pair_of(case)
    nodes, guidance = nodes_of(backend, pipe), backend.default_guidance
    expected = diffusers_images(backend, pipe, PROMPTS, guidance)
    x, velocity = (
        initial_noise(range(3), backend.latent_shape),
        backend.velocity(backend.encode(PROMPTS, guidance)),
    )
    shifted = 1.3 * nodes / (1 + 0.3 * nodes)
    with torch.inference_mode():
        for wrong, grid in [
            (lambda x, sigma: velocity(x, sigma / 1000), nodes),
            (lambda x, sigma: -velocity(x, sigma), nodes),
            (velocity, shifted),
        ]:
            assert difference(sample(Euler(), wrong, x, grid), expected) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_noise_level_and_the_state(pair_of, case):
    backend, _ = pair_of(case)
    x = initial_noise(range(2), backend.latent_shape).requires_grad_()
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    condition = backend.encode(PROMPTS[:2], backend.default_guidance)
    backend.velocity(condition)(x, sigma).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert sigma.grad != 0


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_and_offload(pair_of, case):
    backend, _ = pair_of(case)
    options = CASES[case][2] | {"offload": True}
    half = load(backend.config["model_name_or_path"], case, torch.bfloat16, **options)
    half.precompute_embeddings(PROMPTS, backend.default_guidance)
    assert half.pipe.text_encoder is None
    x, sigma = initial_noise(range(3), backend.latent_shape), torch.tensor(0.5)
    with torch.inference_mode():
        output, expected = (b.velocity(b.encode(PROMPTS, 1))(x, sigma) for b in (half, backend))
    assert output.dtype == torch.float32
    assert ((output - expected).norm() / expected.norm()).item() < 0.05


def few_steps(backend, nodes):
    return Sampler(backend, BASELINES["euler"], "euler", nodes, 1).latents(PROMPTS, range(3))


@pytest.mark.parametrize("case", ["sd3.5 medium", "flux schnell"])
def test_blocks_compile(pair_of, case, monkeypatch):
    from backends import compiled

    monkeypatch.setattr(compiled, "TORCH", compiled.TORCH | {"backend": "aot_eager"})
    backend, before = pair_of(case)[0], compiled.compilations()
    fast = load(backend.config["model_name_or_path"], case, compile=True)
    nodes = backend.sigmas(Spec(num_steps=3))
    a, b = (few_steps(s, nodes) for s in (backend, fast))
    assert difference(a, b) <= 1e-4
    assert compiled.compilations() > before


def test_schnell_has_no_guidance_and_no_shift(pair_of):
    backend, _ = pair_of("flux schnell")
    assert (backend.default_guidance, backend.flow_mu, backend.flow_shift) == (1.0, None, 1.0)
    assert torch.equal(backend.sigmas(Spec(num_steps=5)), flowmatch(5, shift=1.0))
    with pytest.raises(BackendError, match="this FLUX was not distilled for guidance; expected 1"):
        backend.encode(PROMPTS, 3.5)
    note = backend.shift_note(Spec(num_steps=5, flowmatch_mu=1.15))
    assert note.startswith(
        "the nodes are those of time shift mu 1.15, but flux at this resolution has shift 1;"
    )


def test_the_shift_of_a_rectangle_is_that_of_its_tokens(pair_of):
    backend, _ = pair_of("flux rectangle")
    assert backend.latent_shape == (16, 8, 12)
    assert backend.flow_mu == pytest.approx(dynamic_shift(6 * 4))
    assert backend.shift_note(Spec(flowmatch_mu=backend.flow_mu)) is None
    assert "mu 1.15, but flux" in backend.shift_note(Spec(flowmatch_mu=1.15))


def test_krea_has_the_layout_of_dev(tmp_path):
    """The same class, guidance embedding and shift: a finetune of FLUX.1-dev."""
    backend = load(save_flux(tmp_path), "flux")
    assert backend.default_guidance == 3.5
    assert backend.flow_mu == pytest.approx(dynamic_shift(16))


@pytest.mark.parametrize(
    "case, resolution, words",
    [
        ("sd3", "100x64", "expected a positive multiple of 16"),
        ("sd3", "2048x64", "resolution 2048x64: expected at most 1536 pixels a side"),
        ("flux", "96x", r"backend_config.resolution is '96x', expected int: pixels a side, or WIDTHxHEIGHT"),
        ("flux", "128x128", "resolution 128x128: expected 64 for this model"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, case, resolution, words):
    folder = (save_flux if case == "flux" else save_sd3)(tmp_path)
    with pytest.raises(BackendError, match=words) as caught:
        load(folder, case, resolution=resolution)
    assert "\n" not in str(caught.value)


def test_swapped_branches_show_in_stable_diffusion_35(pair_of):
    backend, pipe = pair_of("sd3.5 medium")
    expected = diffusers_images(backend, pipe, PROMPTS, 4.5)
    swapped = backend.velocity(replace(backend.encode(PROMPTS, 4.5), guidance_scale=1 - 4.5))
    x = initial_noise(range(3), backend.latent_shape)
    with torch.inference_mode():
        assert difference(sample(Euler(), swapped, x, nodes_of(backend, pipe)), expected) > 1e-3
