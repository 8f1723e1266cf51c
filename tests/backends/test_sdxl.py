"""Stable Diffusion XL equals diffusers' own StableDiffusionXLPipeline with the same noise and prompts: with a
schedule of betas, eps or v, and with EDM's preconditioning (Playground v2.5).
"""

import functools
import shutil
from dataclasses import replace

import pytest
import torch
from compvis import original_sdxl_checkpoint
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file
from tiny import PROMPTS, calls_of, states
from tiny_sdxl import save_sdxl

from backends import BackendError, initial_noise, load_backend
from backends.sdxl import check_parts
from generation.generate import Sampler
from solvers import BASELINES, DPMpp, Euler, Spec, UserError, sample

CASES = {
    "eps": {},
    "v": {"prediction": "v_prediction"},
    "edm": {"edm": True},
    "edm v": {"edm": True, "prediction": "v_prediction"},
}
STEPS = {"euler": 10, "dpmpp": 9}
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}


def load(folder, dtype=None, **options):
    spec = Spec(backend="sdxl", backend_config={"model_name_or_path": str(folder), **options})
    return load_backend(spec, "cpu", dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a case."""
    return functools.cache(lambda case: save_sdxl(tmp_path_factory.mktemp("sdxl"), **CASES[case]))


@pytest.fixture(scope="module")
def pair_of(made):
    """Our backend and diffusers' pipeline of a case."""

    @functools.cache
    def pair(case):
        pipe = StableDiffusionXLPipeline.from_pretrained(made(case), dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        return load(made(case)), pipe

    return pair


@pytest.fixture(scope="module")
def eps(pair_of):
    return pair_of("eps")[0]


@pytest.fixture(params=CASES)
def pair(request, pair_of):
    return pair_of(request.param)


def configure(pipe, name):
    """Give the pipeline a scheduler; our solver of the same kind and its nodes, of which the last is 0."""
    config, edm = pipe.scheduler.config, "sigma_data" in pipe.scheduler.config
    if name == "euler":
        cls, options, method = EDMEulerScheduler if edm else EulerDiscreteScheduler, {}, Euler()
    else:
        cls, options = EDMDPMSolverMultistepScheduler if edm else DPMSolverMultistepScheduler, DPM
        method = DPMpp(2)
    spacing = {} if edm else {"timestep_spacing": "linspace"}
    pipe.scheduler = cls.from_config(config, **options, **spacing)
    pipe.scheduler.set_timesteps(STEPS[name])
    assert pipe.scheduler.sigmas[-1] == 0
    return method, pipe.scheduler.sigmas.double()


def start(pipe, count, shape=(4, 8, 8)):
    """Unit noise as the pipeline takes it, so that its state is ours, or the variance-preserving one."""
    sigma, own = pipe.scheduler.sigmas[0], pipe.scheduler.init_noise_sigma
    target = (
        sigma / (1 + sigma**2).sqrt() if isinstance(pipe.scheduler, DPMSolverMultistepScheduler) else sigma
    )
    return initial_noise(range(count), shape) * target / own


def diffusers_images(pipe, name, prompts, guidance, output="latent", **options):
    return pipe(
        prompts,
        num_inference_steps=STEPS[name],
        guidance_scale=guidance,
        latents=options.pop("latents", start(pipe, len(prompts))),
        output_type=output,
        **options,
    ).images


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [1, 5.0])
@pytest.mark.parametrize("solver", STEPS)
def test_latents(pair, solver, guidance, batch):
    backend, pipe = pair
    method, sigmas = configure(pipe, solver)
    latents = Sampler(backend, method, solver, sigmas, guidance).latents(PROMPTS[:batch], range(batch))
    expected = diffusers_images(pipe, solver, PROMPTS[:batch], guidance)
    assert expected.abs().max() > 0.5
    assert difference(latents, expected) <= 1e-4 * max(1, expected.abs().max() / 20)


def test_images(pair):
    backend, pipe = pair
    method, sigmas = configure(pipe, "dpmpp")
    images = Sampler(backend, method, "dpmpp", sigmas, 5.0).images(PROMPTS, range(3))
    assert difference(images, diffusers_images(pipe, "dpmpp", PROMPTS, 5.0, "pt")) <= 1e-4


def test_a_rectangle(pair_of, made):
    _, pipe = pair_of("eps")
    method, sigmas = configure(pipe, "euler")
    backend = load(made("eps"), resolution="96x64")
    images = Sampler(backend, method, "euler", sigmas, 5.0).images(PROMPTS, range(3))
    size = {"height": 64, "width": 96, "latents": start(pipe, 3, (4, 8, 12))}
    assert images.shape == (3, 3, 64, 96)
    assert difference(images, diffusers_images(pipe, "euler", PROMPTS, 5.0, "pt", **size)) <= 1e-4


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "", "the dog"])
def test_the_negative_prompt_is_the_pipelines(tmp_path, zeros, negative):
    folder = save_sdxl(tmp_path, zeros=zeros)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    _, text, _, pooled = pipe.encode_prompt(PROMPTS[0], negative_prompt=negative)
    options = {} if negative is None else {"negative_prompt": negative}
    own = load(folder, **options).encode(PROMPTS, 5.0).negative
    assert difference(own["text"], text) <= 1e-5
    assert difference(own["pooled"], pooled) <= 1e-5
    assert (own["text"].abs().max() == 0) == (zeros and negative is None)


def test_what_equality_would_miss_shows(pair):
    """The wrong order of guidance, time, noise level, size, pooled embedding and latent factor each do."""
    backend, pipe = pair
    _, sigmas = configure(pipe, "euler")
    expected = diffusers_images(pipe, "euler", PROMPTS, 5.0)
    condition, x = backend.encode(PROMPTS, 5.0), backend.initial_latents(range(3), sigmas[0])
    velocity, sizes = backend.velocity(condition), backend._sizes
    swapped = backend.velocity(replace(condition, guidance_scale=-4.0))
    pooled = {k: v.flip(0) if k == "pooled" else v for k, v in condition.positive.items()}
    other = backend.velocity(replace(condition, positive=pooled))
    with torch.inference_mode():
        for wrong, grid in [
            (swapped, sigmas),
            (other, sigmas),
            (velocity, sigmas * 1.05),
            (lambda x, sigma: velocity(x, sigma * 1.05), sigmas),
            (lambda x, sigma: -velocity(x, sigma), sigmas),
        ]:
            assert difference(sample(Euler(), wrong, x, grid), expected) > 1e-3
        backend._sizes = sizes * 2
        assert difference(sample(Euler(), velocity, x, sigmas), expected) > 1e-3
        backend._sizes = sizes
        image = diffusers_images(pipe, "euler", PROMPTS, 5.0, "pt")
        assert difference(backend.decode(expected * 1.02), image) > 1e-3


@pytest.mark.parametrize("case, lowest, highest", [("eps", 0.029168, 14.6146), ("edm", 0.002, 80.0)])
def test_noise_levels_and_default_nodes(pair_of, case, lowest, highest):
    backend = pair_of(case)[0]
    assert (backend.sigma_min, backend.sigma_max) == pytest.approx((lowest, highest), rel=1e-4)
    nodes = backend.sigmas(Spec(num_steps=5))
    assert (nodes[0], nodes[-1]) == pytest.approx((highest, lowest), rel=1e-4)
    if case == "edm":
        with pytest.raises(BackendError, match="schedule 'discrete' does not fit"):
            backend.sigmas(Spec(num_steps=5, schedule_type="discrete"))


def test_points_in_one_batch_are_as_one_after_the_other(pair):
    backend, _ = pair
    x, velocity = states(6), backend.velocity(backend.encode(PROMPTS, 5.0))
    with torch.inference_mode():
        together = velocity(x, torch.tensor([0.9] * 3 + [4.0] * 3, dtype=torch.float64))
        apart = torch.cat([velocity(x[:3], torch.tensor(0.9)), velocity(x[3:], torch.tensor(4.0))])
    assert together.dtype == torch.float32
    assert difference(together, apart) <= 1e-4


def test_guidance_is_one_call_of_a_doubled_batch(eps):
    velocity = eps.velocity(eps.encode(PROMPTS, 5.0))
    with torch.inference_mode(), calls_of(eps.network) as calls:
        velocity(states(3), torch.tensor(2.0))
    ((inputs, _), kwargs) = calls[0]
    assert len(calls) == 1
    assert len(inputs) == len(kwargs["added_cond_kwargs"]["time_ids"]) == 6
    assert kwargs["added_cond_kwargs"]["time_ids"][0].tolist() == [64, 64, 0, 0, 64, 64]


def test_gradients_reach_the_noise_level_and_the_state(pair):
    backend, _ = pair
    x = states(2).requires_grad_()
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    backend.velocity(backend.encode(PROMPTS[:2], 5.0))(x, sigma).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert sigma.grad != 0
    assert all(p.grad is None for p in backend.network.parameters())


@pytest.mark.parametrize("dtype, decoder", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_half_precision(made, eps, dtype, decoder):
    """The decoder that overflows in float16 stays in float32; the velocity is that of float32 to rounding."""
    backend = load(made("eps"), dtype)
    assert (backend.dtype, backend.pipe.vae.dtype) == (dtype, decoder)
    x, sigma = states(3), torch.tensor(2.0)
    with torch.inference_mode():
        output, expected = (b.velocity(b.encode(PROMPTS, 1))(x, sigma) for b in (backend, eps))
        assert backend.decode(x / 3).isfinite().all()
    assert output.dtype == torch.float32
    assert ((output - expected).norm() / expected.norm()).item() < 0.05


def few_steps(backend, count):
    nodes = backend.sigmas(Spec(num_steps=count))
    return Sampler(backend, BASELINES["euler"], "euler", nodes, 5.0).latents(PROMPTS, range(3))


def test_offload_gives_the_same_latents_without_text_encoders(made, eps):
    backend = load(made("eps"), offload=True)
    backend.precompute_embeddings(PROMPTS, 5.0)
    assert backend.pipe.text_encoder is backend.pipe.text_encoder_2 is None
    nodes = eps.sigmas(Spec(num_steps=4))
    a, b = (
        Sampler(s, BASELINES["euler"], "euler", nodes, 5.0).latents(PROMPTS, range(3)) for s in (eps, backend)
    )
    assert torch.equal(a, b)


def test_blocks_compile(made, eps, monkeypatch):
    from backends import compiled

    monkeypatch.setattr(compiled, "TORCH", compiled.TORCH | {"backend": "aot_eager"})
    backend, before = load(made("eps"), compile=True), compiled.compilations()
    nodes = eps.sigmas(Spec(num_steps=3))
    a, b = (
        Sampler(s, BASELINES["euler"], "euler", nodes, 5.0).latents(PROMPTS, range(3)) for s in (eps, backend)
    )
    assert difference(a, b) <= 1e-4
    assert compiled.compilations() > before


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, made, tiny_folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(made("eps"))
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path / "refiner")
    pipe = StableDiffusionXLPipeline.from_pretrained(made("eps"))
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(BackendError, match="its U-Net takes the guidance scale as an input"):
        check_parts(pipe, "a model")
    for folder, options, words in [
        (tmp_path / "refiner", {}, "one text encoder instead of two, as Stable Diffusion 1 and the refiner"),
        (tiny_folder, {}, "one text encoder instead of two, as Stable Diffusion 1 and the refiner"),
        (tmp_path / "no-such-folder", {}, "not found"),
        (made("eps"), {"resolution": 100}, "resolution 100: expected a positive multiple of 8"),
        (
            made("eps"),
            {"resolution": "100by80"},
            "resolution is '100by80', expected int: pixels a side, or WIDTHxHEIGHT",
        ),
        (made("eps"), {"refiner": "x"}, "unknown option"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            load(folder, **options)
        assert "\n" not in str(caught.value)


def test_a_single_file_in_the_original_layout(tmp_path, made, eps):
    """The folder without its weights gives the configuration."""
    weights = original_sdxl_checkpoint(eps.pipe)
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in weights
    assert "model.diffusion_model.label_emb.0.0.weight" in weights
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copytree(made("eps"), tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    single = load(tmp_path / "model.safetensors", config=str(tmp_path / "config"))
    x, sigma = states(3), torch.tensor(2.5, dtype=torch.float64)
    with torch.no_grad():
        velocity, expected = (b.velocity(b.encode(PROMPTS, 5.0))(x, sigma) for b in (single, eps))
        assert difference(velocity, expected) <= 1e-5
        assert torch.equal(single.decode(x), eps.decode(x))
