"""The generic flow backbones equal diffusers' pipelines of their class with the same noise and prompts."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from tiny import calls_of
from tiny_others import MAKERS, save_other

from backends import BackendError, find_family, initial_noise, load_backend
from backends.parallel import ParallelEvaluator
from generation.generate import Sampler
from solvers import BASELINES, Euler, Spec, UserError, flowmatch, sample
from solvers.baselines import baseline_of

PROMPTS = ["a photo of the cat", "dog, 8k!", ""]
STEPS, LENGTH = 6, 32
SIZES = {"chroma": {"resolution": 64}}  # whose default of 1024 pixels is not a network's
SHIFTS = {"sana": 3.0, "aura_flow": 1.73, "lumina2": 6.0, "chroma": 3.0}
OPTIONS = {"sana": {"use_resolution_binning": False}}


class Times(DPMSolverMultistepScheduler):
    """DPM-Solver++ with its own noise levels and times that are not rounded to whole numbers."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(len(sigmas) if num_inference_steps is None else num_inference_steps, device)
        self.timesteps = 1000 * self.sigmas[:-1]


def load(name, folder, dtype=None, **options):
    options = (
        {"model_name_or_path": str(folder), "max_sequence_length": LENGTH} | SIZES.get(name, {}) | options
    )
    return load_backend(Spec(backend=name, backend_config=options), "cpu", dtype)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """Our backend and diffusers' pipeline of a family."""

    @functools.cache
    def pair(name):
        folder = save_other(name, tmp_path_factory.mktemp(name))
        pipe = DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        return load(name, folder), pipe

    return pair


@pytest.fixture(params=MAKERS)
def pair(request, pair_of):
    return request.param, *pair_of(request.param)


def configure(name, pipe, solver):
    """Give the pipeline a scheduler; our solver of the same kind and its nodes, of which the last is 0."""
    if solver == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFTS[name])
        uniform = np.linspace(1.0, 1 / STEPS, STEPS)
        options = {"sigmas": uniform} if name in ("lumina2", "chroma") else {"num_inference_steps": STEPS}
        pipe.scheduler.set_timesteps(**options)
        return Euler(), pipe.scheduler.sigmas.double()
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": SHIFTS[name]}
    pipe.scheduler = Times(**flow)
    pipe.scheduler.set_timesteps(STEPS)
    return baseline_of("dpmpp", True), pipe.scheduler.sigmas.double()


def diffusers_images(name, pipe, shape, guidance, count, output="latent"):
    noise = pipe.scheduler.sigmas[0] * initial_noise(range(count), shape)  # DPM-Solver++ begins below 1
    height, width = (n * pipe.vae_scale_factor for n in shape[1:])
    packed = name == "chroma"
    images = pipe(
        PROMPTS[:count],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=FluxPipeline._pack_latents(noise, count, *shape) if packed else noise,
        height=height,
        width=width,
        max_sequence_length=LENGTH,
        output_type=output,
        **OPTIONS.get(name, {}),
    ).images
    if packed and output == "latent":
        return FluxPipeline._unpack_latents(images, height, width, pipe.vae_scale_factor)
    return images


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1, 4.5])
@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_latents(pair, solver, guidance, batch):
    name, backend, pipe = pair
    method, nodes = configure(name, pipe, solver)
    latents = Sampler(backend, method, solver, nodes, guidance).latents(PROMPTS[:batch], range(batch))
    expected = diffusers_images(name, pipe, backend.latent_shape, guidance, batch)
    assert expected.std() > 0.1
    assert difference(latents, expected) <= 1e-4


def test_images(pair):
    name, backend, pipe = pair
    method, nodes = configure(name, pipe, "dpmpp")
    images = Sampler(backend, method, "dpmpp", nodes, 4.5).images(PROMPTS, range(3))
    assert difference(images, diffusers_images(name, pipe, backend.latent_shape, 4.5, 3, "pt")) <= 1e-4


def test_a_rectangle(pair):
    name, square, pipe = pair
    method, nodes = configure(name, pipe, "euler")
    height, width = (n * pipe.vae_scale_factor for n in square.latent_shape[1:])
    backend = load(name, square.config["model_name_or_path"], resolution=f"{width}x{height // 2}")
    images = Sampler(backend, method, "euler", nodes, 4.5).images(PROMPTS, range(3))
    assert images.shape == (3, 3, height // 2, width)
    assert difference(images, diffusers_images(name, pipe, backend.latent_shape, 4.5, 3, "pt")) <= 1e-4


def test_what_equality_would_miss_shows(pair):
    """The wrong order of guidance, time, direction of time, sign, shift and latent factor each do."""
    name, backend, pipe = pair
    _, nodes = configure(name, pipe, "euler")
    expected = diffusers_images(name, pipe, backend.latent_shape, 4.5, 3)
    condition, x = backend.encode(PROMPTS, 4.5), initial_noise(range(3), backend.latent_shape)
    velocity = backend.velocity(condition)
    swapped = backend.velocity(replace(condition, guidance_scale=1 - 4.5))
    with torch.inference_mode():
        for wrong, grid in [
            (swapped, nodes),
            (lambda x, sigma: velocity(x, sigma / 1000), nodes),
            (lambda x, sigma: velocity(x, 1 - sigma), nodes),
            (lambda x, sigma: -velocity(x, sigma), nodes),
            (velocity, 1.3 * nodes / (1 + 0.3 * nodes)),
        ]:
            assert difference(sample(Euler(), wrong, x, grid), expected) > 1e-3
        image = diffusers_images(name, pipe, backend.latent_shape, 4.5, 3, "pt")
        assert difference(backend.decode(expected * 1.05), image) > 1e-3


def test_guidance_keeps_the_norm_of_the_conditional_output_in_lumina(pair_of):
    backend, pipe = pair_of("lumina2")
    _, nodes = configure("lumina2", pipe, "euler")
    expected = diffusers_images("lumina2", pipe, backend.latent_shape, 4.5, 3)
    plain = backend.velocity(replace(backend.encode(PROMPTS, 4.5), renormalised=False))
    with torch.inference_mode():
        x = initial_noise(range(3), backend.latent_shape)
        assert difference(sample(Euler(), plain, x, nodes), expected) > 1e-3


def test_negative_prompts_count(pair):
    name, backend, _ = pair
    other = load(name, backend.config["model_name_or_path"], negative_prompt="dog")
    x, sigma = initial_noise([0], backend.latent_shape), torch.tensor(0.7)
    with torch.inference_mode():
        a, b = (s.velocity(s.encode(PROMPTS[:1], 4.5))(x, sigma) for s in (backend, other))
    assert difference(a, b) > 1e-4


def test_nodes_are_those_of_the_shift(pair):
    name, backend, _ = pair
    assert backend.flow_shift == SHIFTS[name]
    assert torch.equal(backend.sigmas(Spec(num_steps=5)), flowmatch(5, shift=SHIFTS[name]))
    assert (backend.default_guidance, backend.default_schedule) == (
        find_family(name).backend.default_guidance,
        "flowmatch",
    )


def test_points_in_one_batch_and_in_several_calls(pair):
    """Also in calls of two rows, each with its own images."""
    _, backend, _ = pair
    condition, x = backend.encode(PROMPTS, 4.5), initial_noise(range(6), backend.latent_shape)
    velocity, sigma = backend.velocity(condition), torch.tensor([0.9] * 3 + [0.4] * 3, dtype=torch.float64)
    with torch.inference_mode():
        together = velocity(x, sigma)
        apart = torch.cat([velocity(x[:3], torch.tensor(0.9)), velocity(x[3:], torch.tensor(0.4))])
        few = ParallelEvaluator(rows=2).velocity(backend, condition)(x, sigma)
    assert together.dtype == torch.float32
    assert difference(together, apart) <= 1e-4
    assert difference(together, few) <= 1e-4


def test_guidance_is_one_call_of_a_doubled_batch(pair):
    _, backend, _ = pair
    velocity = backend.velocity(backend.encode(PROMPTS, 4.5))
    with torch.inference_mode(), calls_of(backend.network) as calls:
        velocity(initial_noise(range(3), backend.latent_shape), torch.tensor(0.5))
    assert [len(kwargs["hidden_states"]) for _, kwargs in calls] == [6]


def test_gradients_reach_the_noise_level_and_the_state(pair):
    _, backend, _ = pair
    x = initial_noise(range(2), backend.latent_shape).requires_grad_()
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    backend.velocity(backend.encode(PROMPTS[:2], 4.5))(x, sigma).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert sigma.grad != 0
    assert all(p.grad is None for p in backend.network.parameters())


def test_bfloat16(pair):
    name, backend, _ = pair
    half = load(name, backend.config["model_name_or_path"], torch.bfloat16)
    x, sigma = initial_noise(range(3), backend.latent_shape), torch.tensor(0.5)
    with torch.inference_mode():
        output, expected = (b.velocity(b.encode(PROMPTS, 1))(x, sigma) for b in (half, backend))
        assert half.decode(x).isfinite().all()
    assert output.dtype == torch.float32
    assert ((output - expected).norm() / expected.norm()).item() < 0.1


def few_steps(backend):
    nodes = backend.sigmas(Spec(num_steps=3))
    return Sampler(backend, BASELINES["euler"], "euler", nodes, 4.5).latents(PROMPTS, range(3))


def test_offload_gives_the_same_latents_without_text_encoders(pair):
    name, backend, _ = pair
    other = load(name, backend.config["model_name_or_path"], offload=True)
    other.precompute_embeddings(PROMPTS, 4.5)
    assert other.pipe.text_encoder is None
    assert torch.equal(few_steps(other), few_steps(backend))
    with pytest.raises(BackendError, match="offload: the text encoders are freed, and prompt 'a third'"):
        other.encode(["a third"], 4.5)


def test_blocks_compile(pair, monkeypatch):
    from backends import compiled

    monkeypatch.setattr(compiled, "TORCH", compiled.TORCH | {"backend": "aot_eager"})
    name, backend, _ = pair
    fast, before = load(name, backend.config["model_name_or_path"], compile=True), compiled.compilations()
    assert difference(few_steps(fast), few_steps(backend)) <= 1e-4
    assert compiled.compilations() > before


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("aura_flow", {"resolution": 128}, "resolution 128: expected at most 64 pixels a side"),
        ("lumina2", {"resolution": 72}, "resolution 72: expected a positive multiple of 16"),
        ("sana", {"guidance": 3}, "unknown option"),
        ("chroma", {"model_name_or_path": "./none"}, "not found"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pair_of, name, options, words):
    with pytest.raises(UserError, match=words) as caught:
        load(name, pair_of(name)[0].config["model_name_or_path"], **options)
    assert "\n" not in str(caught.value)


def test_a_scheduler_without_a_shift_is_refused(pair_of, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pair_of("aura_flow")[0].config["model_name_or_path"])
    pipe.scheduler = DDIMScheduler()
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(BackendError, match="has no time shift: expected shift or flow_shift"):
        load("aura_flow", tmp_path / "pipe")
