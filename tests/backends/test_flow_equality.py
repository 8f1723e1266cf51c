"""Latents and images equal diffusers' own StableDiffusion3Pipeline and FluxPipeline with the same noise and
prompts.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from tiny_flow import save_flux, save_sd3

from backends import BackendError, initial_noise, load_backend
from backends.loading import absent_parts
from digits import FOLDERS, OPTIONS
from generation.generate import Sampler
from solvers import Euler, Spec, flowmatch, sample

PROMPTS = ["a photo of the cat", "dog, 8k!", ""]
STEPS, LENGTH = 6, 32


def load(name, folder, dtype=None, **options):
    options = {"model_name_or_path": str(folder), "max_sequence_length": LENGTH} | options
    return load_backend(Spec(backend=name, backend_config=options), "cpu", dtype)


CASES = {"sd3": ("with T5", "without T5", "digits twin"), "flux": ("random", "digits twin")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our backend and diffusers' pipeline of one folder, by family and case: random weights, or the trained
    twin.
    """

    @functools.cache
    def made(name, case):
        if case == "digits twin":
            folder, options = FOLDERS[name], OPTIONS[name]
        else:
            folder = tmp_path_factory.mktemp(name)
            folder, options = (
                save_flux(folder) if name == "flux" else save_sd3(folder, t5=case == "with T5"),
                {},
            )
        cls = FluxPipeline if name == "flux" else StableDiffusion3Pipeline
        pipe = cls.from_pretrained(
            folder, dtype=torch.float32, **absent_parts({"model_name_or_path": str(folder)})
        )
        pipe.set_progress_bar_config(disable=True)
        return load(name, folder, **options), pipe

    return made


@pytest.fixture(params=CASES["sd3"])
def sd3(request, pair):
    return pair("sd3", request.param)


@pytest.fixture(params=CASES["flux"])
def flux(request, pair):
    return pair("flux", request.param)


@pytest.fixture(params=[(name, case) for name in CASES for case in CASES[name]], ids=" ".join)
def either(request, pair):
    return pair(*request.param)


def with_zero(nodes):
    return torch.cat([nodes, nodes.new_zeros(1)])


def call_options(backend, output):
    """The arguments of diffusers' pipelines that fit our backend."""
    pixels = backend.latent_shape[1] * backend.pipe.vae_scale_factor
    return {
        "height": pixels,
        "width": pixels,
        "max_sequence_length": backend.config["max_sequence_length"],
        "output_type": output,
    }


def diffusers_sd3(backend, pipe, prompts, guidance, output="latent"):
    noise = initial_noise(range(len(prompts)), backend.latent_shape)
    return pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=noise,
        **call_options(backend, output),
    ).images


def diffusers_flux(backend, pipe, prompts, guidance, output="latent"):
    channels, height, width = backend.latent_shape
    packed = FluxPipeline._pack_latents(
        initial_noise(range(len(prompts)), backend.latent_shape), len(prompts), channels, height, width
    )
    options = call_options(backend, output)
    images = pipe(
        prompts, num_inference_steps=STEPS, guidance_scale=guidance, latents=packed, **options
    ).images
    if output != "latent":
        return images
    return FluxPipeline._unpack_latents(images, options["height"], options["width"], pipe.vae_scale_factor)


def flux_nodes(pipe):
    """The pipeline's own nodes: linspace(1, 1 / N, N) shifted by mu."""
    pipe.scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)
    )
    return pipe.scheduler.sigmas.double()


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1, 4.5])
def test_sd3_latents(sd3, guidance, batch):
    backend, pipe = sd3
    nodes = with_zero(flowmatch(STEPS, shift=backend.flow_shift))
    latents = Sampler(backend, Euler(), "euler", nodes, guidance).latents(PROMPTS[:batch], range(batch))
    expected = diffusers_sd3(backend, pipe, PROMPTS[:batch], guidance)
    assert expected.std() > 0.1
    assert difference(latents, expected) <= 1e-4


def test_sd3_images_and_nodes(sd3):
    backend, pipe = sd3
    nodes = with_zero(backend.sigmas(Spec(num_steps=STEPS)))
    pipe.scheduler.set_timesteps(STEPS)
    torch.testing.assert_close(pipe.scheduler.sigmas.double(), nodes, rtol=0, atol=1e-7)
    images = Sampler(backend, Euler(), "euler", nodes, 4.5).images(PROMPTS, range(3))
    assert difference(images, diffusers_sd3(backend, pipe, PROMPTS, 4.5, "pt")) <= 1e-4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1, 3.5])
def test_flux_latents(flux, guidance, batch):
    backend, pipe = flux
    latents = Sampler(backend, Euler(), "euler", flux_nodes(pipe), guidance).latents(
        PROMPTS[:batch], range(batch)
    )
    expected = diffusers_flux(backend, pipe, PROMPTS[:batch], guidance)
    assert expected.std() > 0.1
    assert difference(latents, expected) <= 1e-4


def test_flux_images_and_shift(flux):
    backend, pipe = flux
    assert backend.flow_mu == pytest.approx(0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256))
    images = Sampler(backend, Euler(), "euler", flux_nodes(pipe), 3.5).images(PROMPTS, range(3))
    assert difference(images, diffusers_flux(backend, pipe, PROMPTS, 3.5, "pt")) <= 1e-4


def test_a_pipeline_of_our_flux_network_keeps_its_own_times(flux):
    backend, pipe = flux
    expected = diffusers_flux(backend, pipe, PROMPTS, 3.5)
    Sampler(backend, Euler(), "euler", flux_nodes(pipe), 3.5).latents(PROMPTS, range(3))
    shared = FluxPipeline(**backend.pipe.components)
    shared.set_progress_bar_config(disable=True)
    assert difference(diffusers_flux(backend, shared, PROMPTS, 3.5), expected) <= 1e-6


def test_what_equality_would_miss_shows_in_sd3(sd3):
    """The wrong guidance order, shift, time scale and latent factor each move the result by far more than the
    bound.
    """
    backend, pipe = sd3
    expected, nodes = diffusers_sd3(backend, pipe, PROMPTS, 4.5), with_zero(flowmatch(STEPS, shift=3.0))
    condition, x = backend.encode(PROMPTS, 4.5), initial_noise(range(3), backend.latent_shape)
    velocity = backend.velocity(condition)
    swapped = backend.velocity(replace(condition, guidance_scale=1 - 4.5))
    with torch.inference_mode():
        for wrong, grid in [
            (swapped, nodes),
            (velocity, with_zero(flowmatch(STEPS, shift=2.5))),
            (lambda x, sigma: velocity(x, sigma / 1000), nodes),
        ]:
            assert difference(sample(Euler(), wrong, x, grid), expected) > 1e-3
        image = diffusers_sd3(backend, pipe, PROMPTS, 4.5, "pt")
        assert difference(backend.decode(expected * 1.02), image) > 1e-3


def test_what_equality_would_miss_shows_in_flux(flux):
    """So do the wrong embedded guidance and the wrong shift."""
    backend, pipe = flux
    expected, nodes = diffusers_flux(backend, pipe, PROMPTS, 3.5), flux_nodes(pipe)
    assert (
        difference(Sampler(backend, Euler(), "euler", nodes, 3.0).latents(PROMPTS, range(3)), expected) > 1e-3
    )
    shifted = with_zero(flowmatch(STEPS, mu=1.15))
    assert (
        difference(Sampler(backend, Euler(), "euler", shifted, 3.5).latents(PROMPTS, range(3)), expected)
        > 1e-3
    )
    velocity, x = (
        backend.velocity(backend.encode(PROMPTS, 3.5)),
        initial_noise(range(3), backend.latent_shape),
    )
    with torch.inference_mode():
        assert (
            difference(sample(Euler(), lambda x, sigma: velocity(x, sigma / 1000), x, nodes), expected) > 1e-3
        )
        assert (
            difference(backend.decode(expected * 1.02), diffusers_flux(backend, pipe, PROMPTS, 3.5, "pt"))
            > 1e-3
        )


def test_points_in_one_batch_are_as_one_after_the_other(either):
    backend, _ = either
    condition, x = backend.encode(PROMPTS, 3.5), initial_noise(range(6), backend.latent_shape)
    velocity = backend.velocity(condition)
    with torch.inference_mode():
        together = velocity(x, torch.tensor([0.9] * 3 + [0.4] * 3, dtype=torch.float64))
        apart = torch.cat([velocity(x[:3], torch.tensor(0.9)), velocity(x[3:], torch.tensor(0.4))])
    assert together.dtype == torch.float32
    assert difference(together, apart) <= 1e-4


def test_a_bfloat16_network_gives_its_velocity_unharmed(sd3):
    """Recovering the velocity from a bfloat16 denoiser, the published way, loses percents at the last nodes;
    ours nothing.
    """
    backend = load(
        "sd3",
        sd3[0].config["model_name_or_path"],
        torch.bfloat16,
        max_sequence_length=sd3[0].config["max_sequence_length"],
    )
    assert backend.dtype == torch.bfloat16
    sigma, condition = torch.tensor(0.05), backend.encode(PROMPTS, 1)
    embeddings, velocity = condition.positive, backend.velocity(condition)
    with torch.inference_mode():
        noise = initial_noise(range(3), backend.latent_shape)
        x = sample(
            Euler(), velocity, noise, torch.linspace(1, 0.05, 12, dtype=torch.float64)
        )  # a state as it is at this level
        output = velocity(x, sigma)
        own = backend.pipe.transformer(
            hidden_states=x.bfloat16(),
            timestep=torch.full((3,), 50.0),
            encoder_hidden_states=embeddings["text"],
            pooled_projections=embeddings["pooled"],
            return_dict=False,
        )[0].float()
    assert difference(output, own) == 0
    half = x.bfloat16()
    published = (half.float() - (half - sigma.bfloat16() * own.bfloat16()).float()) / sigma
    lost = ((published - own).norm() / own.norm()).item()
    print(
        "velocity at sigma 0.05 in bfloat16: the network's own lost 0 %, recovered from the denoiser"
        f" {100 * lost:.1f} %"
    )
    assert lost > 0.02


def test_a_bfloat16_flux_distinguishes_nearby_times(flux):
    """Left alone, it would round times to bfloat16: 100 of them between 0.95 and 1 would be 13."""
    backend = load(
        "flux",
        flux[0].config["model_name_or_path"],
        torch.bfloat16,
        max_sequence_length=flux[0].config["max_sequence_length"],
    )
    seen = []
    backend.pipe.transformer.time_text_embed.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    sigmas = torch.linspace(0.95, 1, 100, dtype=torch.float64)
    with torch.inference_mode():
        backend.velocity(backend.encode([PROMPTS[0]] * 100, 3.5))(
            initial_noise([0] * 100, backend.latent_shape), sigmas
        )
    assert len(seen[0].unique()) == 100
    torch.testing.assert_close(seen[0].double(), 1000 * sigmas, rtol=1e-7, atol=0)
    assert len((sigmas.bfloat16() * 1000).unique()) < 20


def test_gradients_reach_the_noise_level_and_the_state(either):
    backend, _ = either
    x = initial_noise(range(2), backend.latent_shape).requires_grad_()
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    backend.velocity(backend.encode(PROMPTS[:2], 3.5))(x, sigma).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert sigma.grad != 0
    assert all(p.grad is None for p in backend.pipe.transformer.parameters())


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, pair):
    flux, sd3 = pair("flux", "random"), pair("sd3", "with T5")
    folder = flux[0].config["model_name_or_path"]
    for name, path, options, message in [
        ("flux", folder, {"negative_prompt": "ugly"}, "FLUX has no negative prompt"),
        ("flux", folder, {"resolution": 128}, "resolution 128: expected 64"),
        ("sd3", sd3[0].config["model_name_or_path"], {"resolution": 100}, "multiple of 16"),
        ("sd3", folder, {}, "could not be loaded: expected a Stable Diffusion 3 pipeline"),
        ("flux", "/no/such/folder", {}, "not found"),
        ("flux", folder, {"steps": 3}, "unknown option"),
    ]:
        with pytest.raises(BackendError, match=message) as caught:
            load(name, path, **options)
        assert "\n" not in str(caught.value)
    schnell = load("flux", save_flux(tmp_path, guidance_embeds=False))
    schnell.encode(PROMPTS, 1)
    with pytest.raises(BackendError, match="not distilled for guidance"):
        schnell.encode(PROMPTS, 3.5)
    with pytest.raises(BackendError, match="does not fit backend 'flux'"):
        flux[0].sigmas(Spec(num_steps=4, schedule_type="discrete"))


def test_flux_is_downloaded_only_when_allowed(monkeypatch):
    monkeypatch.delenv("FLUX_MODEL_PATH", raising=False)
    monkeypatch.delenv("FLUX_ALLOW_REMOTE", raising=False)
    with pytest.raises(
        BackendError,
        match=r"neither a folder here nor in the local cache.*hf download black-forest-labs/FLUX.1-dev",
    ):
        load_backend(Spec(backend="flux"), "cpu")
    monkeypatch.setenv("FLUX_MODEL_PATH", "/somewhere/flux")
    with pytest.raises(BackendError, match="'/somewhere/flux' not found"):
        load_backend(Spec(backend="flux"), "cpu")


def test_negative_prompts_count(pair):
    sd3 = pair("sd3", "with T5")
    folder = sd3[0].config["model_name_or_path"]
    x, sigma = initial_noise([0], sd3[0].latent_shape), torch.tensor(0.7)
    with torch.inference_mode():
        plain = sd3[0].velocity(sd3[0].encode(PROMPTS[:1], 4.5))(x, sigma)
        other = load("sd3", folder, negative_prompt="dog")
        assert difference(other.velocity(other.encode(PROMPTS[:1], 4.5))(x, sigma), plain) > 1e-4
