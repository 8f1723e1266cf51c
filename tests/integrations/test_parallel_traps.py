"""Parallel points beside other features of diffusers, and each situation in which they are refused."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from cases import OTHERS, Case
from diffusers import (
    AutoPipelineForImage2Image,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    UNet2DConditionModel,
)
from parallel_cases import CONFIG, PICTURE, build, scheduler_for, sequential_and_parallel
from reference import CLOSE, random_table
from scheduler_cases import modular_sd3, noise_nodes

from integrations.diffusers import EPDScheduler, disable_parallel_points, enable_parallel_points
from solvers import flowmatch, load_predictor


@pytest.fixture
def sd(parts, tmp_path):
    """A pipeline with a table and parallel points enabled."""
    case, (scheduler, cost) = build("sd", parts), scheduler_for("sd", parts, "epd", tmp_path)
    case.pipe.scheduler = scheduler
    enable_parallel_points(case.pipe)
    yield case, scheduler, cost
    disable_parallel_points(case.pipe)


def close(a, b):
    return (a - b).abs().max() < CLOSE * max(1.0, a.abs().max())


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "z_image"])
def test_further_pipelines(name, tmp_path):
    """Among them timesteps as t / 1000 (AuraFlow, QwenImage) and 1 - t / 1000 (Lumina2)."""
    torch.manual_seed(0)
    case = OTHERS[name]()
    stock = case.pipe.scheduler
    flow = "beta_start" not in stock.config
    path = random_table(
        "epd", flowmatch(3, shift=2.0) if flow else noise_nodes(stock.config, 3), tmp_path, None
    )
    scheduler, cost = EPDScheduler.from_predictor(path, config=stock.config), load_predictor(path).cost()
    plain = case.latents(scheduler, cost.evaluations, case.noise())
    enable_parallel_points(case.pipe)
    assert close(plain, case.latents(scheduler, cost.depth, case.noise()))


def test_networks_that_take_a_list_are_refused(tmp_path):
    case = OTHERS["z_image"]()
    path = random_table("epd", flowmatch(3, shift=2.0), tmp_path, None)
    case.pipe.scheduler = EPDScheduler.from_predictor(path, config=case.pipe.scheduler.config)
    enable_parallel_points(case.pipe)
    with pytest.raises(ValueError, match="takes no tensor of latents and timesteps"):
        case.latents(case.pipe.scheduler, 4, case.noise())


def test_positions_as_long_as_the_batch_are_left_alone(parts, tmp_path):
    """FLUX's txt_ids have a row for each of 8 words, and so have 8 images."""
    case, (scheduler, cost) = build("flux", parts), scheduler_for("flux", parts, "epd", tmp_path)
    case.options |= {"prompt": ["a cat"] * 8}
    plain = case.latents(scheduler, cost.evaluations, case.noise(8))
    enable_parallel_points(case.pipe)
    parallel = case.latents(scheduler, cost.depth, case.noise(8))
    disable_parallel_points(case.pipe)
    assert close(plain, parallel)


@pytest.mark.parametrize("kind", ["epd", "wide2"])
def test_the_modular_pipeline_of_stable_diffusion_3(parts, kind, tmp_path):
    case, (scheduler, cost) = build("sd3", parts), scheduler_for("sd3", parts, kind, tmp_path)
    modular = modular_sd3(case.pipe, scheduler)
    options = {k: v for k, v in case.options.items() if k != "guidance_scale"} | {"negative_prompt": ""}
    options |= {"output": "latents"}
    plain = modular(**options, num_inference_steps=cost.evaluations, latents=case.noise(2))
    enable_parallel_points(modular)
    parallel = modular(**options, num_inference_steps=cost.depth, latents=case.noise(2))
    disable_parallel_points(modular)
    assert close(plain, parallel)


def test_image_to_image_and_a_pipeline_of_the_same_parts(sd):
    """The second pipeline shares networks and scheduler, so points are parallel there as well."""
    case, scheduler, cost = sd
    other = AutoPipelineForImage2Image.from_pipe(case.pipe)
    options = {"prompt": ["a cat"], "image": PICTURE, "strength": 0.5}
    second = Case(other, case.shape, options)
    parallel = second.latents(scheduler, cost.depth, None)
    disable_parallel_points(other)
    assert close(second.latents(scheduler, cost.evaluations, None), parallel)


def test_freeu(sd):
    case, scheduler, cost = sd
    case.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    parallel = case.latents(scheduler, cost.depth, case.noise(2))
    disable_parallel_points(case.pipe)
    plain = case.latents(scheduler, cost.evaluations, case.noise(2))
    case.pipe.disable_freeu()
    assert close(plain, parallel)


def test_an_accelerate_hook(parts, tmp_path):
    """It replaces forward, as offloading does."""
    case, (scheduler, cost) = build("sd", parts), scheduler_for("sd", parts, "epd", tmp_path)
    unet = UNet2DConditionModel.from_config(case.pipe.unet.config)
    add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu"))
    case.pipe.unet = unet
    assert close(*sequential_and_parallel(case, scheduler, cost))


def test_layerwise_casting(parts, tmp_path):
    case, (scheduler, cost) = build("sd", parts), scheduler_for("sd", parts, "epd", tmp_path)
    case.pipe.unet = UNet2DConditionModel.from_config(case.pipe.unet.config)
    case.pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert close(*sequential_and_parallel(case, scheduler, cost))


@pytest.mark.slow
def test_a_compiled_network(parts, tmp_path):
    """torch.compile gives a new module, whose hooks run before it; compiling takes a minute."""
    case, (scheduler, cost) = build("sd", parts), scheduler_for("sd", parts, "epd", tmp_path)
    case.pipe.unet = torch.compile(case.pipe.unet, backend="eager")
    plain, parallel = sequential_and_parallel(case, scheduler, cost)
    torch._dynamo.reset()
    assert close(plain, parallel)


def test_disabling_gives_one_point_a_call_again(sd):
    case, scheduler, cost = sd
    disable_parallel_points(case.pipe)
    first = case.latents(scheduler, cost.evaluations, case.noise(2))
    enable_parallel_points(case.pipe)
    enable_parallel_points(case.pipe)  # once more changes nothing
    parallel = case.latents(scheduler, cost.depth, case.noise(2))
    disable_parallel_points(case.pipe)
    assert torch.equal(case.latents(scheduler, cost.evaluations, case.noise(2)), first)
    assert close(first, parallel)
    assert not case.pipe.unet._forward_pre_hooks


def test_the_number_of_steps_is_the_depth(sd):
    case, scheduler, cost = sd
    with pytest.raises(
        ValueError, match="num_inference_steps=6, but its learned tables have 4 network calls"
    ):
        case.latents(scheduler, cost.evaluations, case.noise(2))


def test_a_swapped_network_is_an_error(sd):
    case, scheduler, cost = sd
    hooked = case.pipe.unet
    case.pipe.unet = UNet2DConditionModel.from_config(hooked.config)
    with pytest.raises(ValueError, match=r"call enable_parallel_points\(pipe\) again"):
        case.latents(scheduler, cost.depth, case.noise(2))
    case.pipe.unet = hooked


def test_a_replaced_scheduler_is_an_error(sd):
    case, _, _ = sd
    with pytest.raises(
        ValueError, match="the pipeline's scheduler was replaced; call disable_parallel_points"
    ):
        case.latents(EulerDiscreteScheduler.from_config(CONFIG), 4, case.noise(2))


def test_a_call_outside_a_run_is_an_error(sd):
    case, scheduler, cost = sd
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 32)
    for _ in range(2):
        with pytest.raises(ValueError, match="its network was called outside a run"):
            case.pipe.unet(x, 10, text)
        case.latents(scheduler, cost.depth, case.noise(2))


def test_a_timestep_that_is_not_due_is_an_error(sd):
    case, scheduler, _ = sd
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="the network's timestep is 500, expected 999"):
        case.pipe.unet(torch.zeros(1, 4, 8, 8), 500, torch.zeros(1, 77, 32))


def test_step_caches_are_refused(parts, tmp_path):
    case, (scheduler, cost) = build("flux", parts), scheduler_for("flux", parts, "epd", tmp_path)
    case.pipe.scheduler, network = scheduler, case.pipe.transformer
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel has a step cache .*call disable_cache"):
        enable_parallel_points(case.pipe)
    network.disable_cache()
    enable_parallel_points(case.pipe)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="has a step cache"):
        case.latents(scheduler, cost.depth, case.noise(2))
    network.disable_cache()
    disable_parallel_points(case.pipe)


def test_another_scheduler_is_refused(parts):
    pipe = build("sd", parts).pipe
    pipe.scheduler = EulerDiscreteScheduler.from_config(CONFIG)
    with pytest.raises(ValueError, match="the scheduler is EulerDiscreteScheduler, expected an EPDScheduler"):
        enable_parallel_points(pipe)


def test_tables_of_one_depth_cannot_be_chosen_between(parts, tmp_path):
    case = build("sd", parts)
    paths = [
        random_table(kind, noise_nodes(CONFIG, n), tmp_path, "ldm") for kind, n in (("epd", 3), ("wide2", 3))
    ]
    case.pipe.scheduler = EPDScheduler.from_predictor(*paths, config=CONFIG)
    enable_parallel_points(case.pipe)
    with pytest.raises(
        ValueError, match="num_inference_steps=4, which several of its tables have: 4, 4 network calls"
    ):
        case.latents(case.pipe.scheduler, 4, case.noise(2))
    disable_parallel_points(case.pipe)


def test_tokens_beside_the_latents_are_refused(parts, tmp_path):
    """As FLUX Kontext appends those of its picture."""
    case, (scheduler, _) = build("flux", parts), scheduler_for("flux", parts, "epd", tmp_path)
    case.pipe.scheduler = scheduler
    enable_parallel_points(case.pipe)
    scheduler.set_timesteps(4)
    x, network = case.noise(2), case.pipe.transformer
    options = {"encoder_hidden_states": torch.zeros(2, 8, 32), "pooled_projections": torch.zeros(2, 32)}
    options |= {"txt_ids": torch.zeros(8, 3), "img_ids": torch.zeros(32, 3), "guidance": torch.ones(2)}
    wide, t = torch.cat([x, x], 1), scheduler.timesteps
    out = network(wide, timestep=t[:1] / 1000, **options).sample[:, :16]
    x = scheduler.step(out, t[0], x).prev_sample
    with pytest.raises(ValueError, match="has other rows or tokens than the latents'"):
        network(torch.cat([x, x], 1), timestep=t[1:2] / 1000, **options)
    disable_parallel_points(case.pipe)
