"""Latents and images equal diffusers' own StableDiffusionPipeline with the same scheduler, nodes, noise and
prompts.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from tiny import load_tiny

from backends import initial_noise
from digits import FOLDER
from generation.generate import Sampler
from solvers import DPMpp, Euler, sample

PROMPTS = ["a bold red handwritten three", "the digit five in blue, thin", "a purple nine"]
STEPS = {"euler": 10, "dpmpp": 9}  # the whole-numbered timesteps 999, 888, ..., 111 and, for Euler, 0


@pytest.fixture(scope="module", params=["tiny", "digits"])
def pair(request, tiny_folder):
    """Our backend of a folder and a pipeline that diffusers loads of it."""
    folder = tiny_folder if request.param == "tiny" else FOLDER
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return load_tiny(folder), pipe


def configure(pipe, solver):
    """Give the pipeline a scheduler; our solver of the same kind and its nodes, of which the last is 0."""
    if solver == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="linspace"
        )
        method = Euler()
    else:
        options = {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "timestep_spacing": "linspace",
        }
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
        method = DPMpp(2)
    pipe.scheduler.set_timesteps(STEPS[solver])
    assert torch.equal(pipe.scheduler.timesteps.double() % 1, torch.zeros(STEPS[solver], dtype=torch.float64))
    assert pipe.scheduler.sigmas[-1] == 0
    return method, pipe.scheduler.sigmas.double()


def diffusers_images(pipe, solver, prompts, guidance, output="latent"):
    """What the pipeline makes of seeds 0, 1, ...; the solver's state is variance preserving for
    DPM-Solver++.
    """
    latents, sigma = initial_noise(range(len(prompts)), (4, 8, 8)), pipe.scheduler.sigmas[0]
    if solver == "dpmpp":
        latents = latents * sigma / (1 + sigma**2).sqrt()
    return pipe(
        prompts,
        num_inference_steps=STEPS[solver],
        guidance_scale=guidance,
        latents=latents,
        output_type=output,
    ).images


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1, 7.5])
@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_latents(pair, solver, guidance, batch):
    backend, pipe = pair
    method, sigmas = configure(pipe, solver)
    prompts = PROMPTS[:batch]
    latents = Sampler(backend, method, solver, sigmas, guidance).latents(prompts, range(batch))
    expected = diffusers_images(pipe, solver, prompts, guidance)
    assert expected.abs().max() > 0.5
    assert difference(latents, expected) <= 1e-4 * max(
        1, expected.abs().max() / 20
    )  # random weights: latents up to 60


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_images(pair, solver):
    backend, pipe = pair
    method, sigmas = configure(pipe, solver)
    images = Sampler(backend, method, solver, sigmas, 7.5).images(PROMPTS, range(3))
    assert difference(images, diffusers_images(pipe, solver, PROMPTS, 7.5, "pt")) <= 1e-4


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_guidance_the_wrong_way_round_would_show(pair, solver):
    backend, pipe = pair
    method, sigmas = configure(pipe, solver)
    condition = backend.encode(PROMPTS, 7.5)
    empty = {k: v.expand(3, -1, -1) for k, v in condition.negative.items()}
    swapped = replace(condition, positive=empty, negative=condition.positive)
    with torch.inference_mode():
        latents = sample(
            method, backend.velocity(swapped), backend.initial_latents(range(3), sigmas[0]), sigmas
        )
    assert difference(latents, diffusers_images(pipe, solver, PROMPTS, 7.5)) > 1e-3


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_a_time_off_by_one_would_show(pair, solver, shift, monkeypatch):
    backend, pipe = pair
    method, sigmas = configure(pipe, solver)
    expected = diffusers_images(pipe, solver, PROMPTS, 7.5)
    forward = backend.pipe.unet.forward
    monkeypatch.setattr(
        backend.pipe.unet, "forward", lambda x, t, **options: forward(x, t + shift, **options)
    )
    latents = Sampler(backend, method, solver, sigmas, 7.5).latents(PROMPTS, range(3))
    assert difference(latents, expected) > 1e-3
