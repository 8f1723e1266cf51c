"""EPDScheduler in unmodified text-to-image pipelines: the latents of the project's own path."""

import pytest
import torch
from cases import Case, controlnet, noise_scheduler, sd_parts, sdxl_parts
from diffusers import (
    FluxPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)
from reference import CLOSE, own_latents, random_table, table_file, velocity_of
from scheduler_cases import GUIDANCE, KINDS, PROMPTS, SHIPPED, digits_case, modular_sd3, noise_nodes

from integrations.diffusers import EPDScheduler
from solvers import flowmatch, load_predictor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", GUIDANCE)
def test_the_three_families(digits, family, kind, tmp_path):
    backend = digits[family]
    case, config = digits_case(backend, family), backend.pipe.scheduler.config
    if (family, kind) in SHIPPED:
        path = table_file(SHIPPED[family, kind])
    else:
        shift = {"mu": backend.flow_mu} if family == "flux" else {"shift": backend.flow_shift}
        path = random_table(kind, flowmatch(4, **shift), tmp_path, family)
    predictor, noise = load_predictor(path), case.noise(len(PROMPTS))
    with torch.inference_mode():
        velocity = backend.velocity(backend.encode(PROMPTS, GUIDANCE[family]))
        expected = own_latents(predictor, velocity, noise)
    if family == "flux":
        expected, noise = (FluxPipeline._pack_latents(x, len(x), *case.shape) for x in (expected, noise))
    actual = case.latents(
        EPDScheduler.from_predictor(path, config=config), predictor.cost().evaluations, noise
    )
    assert (actual - expected).abs().max() < CLOSE
    assert (expected - noise).abs().max() > 1  # the solver has gone somewhere


def pipelines(folder) -> dict[str, Case]:
    """Tiny random pipelines with noise schedules, by name."""
    sd, xl = sd_parts(folder / "sd"), sdxl_parts(folder / "xl")
    text, size = {"prompt": "a cat", "guidance_scale": 5.0}, {"height": 64, "width": 64}
    pag = {"pag_scale": 3.0, "pag_applied_layers": ["mid"]}
    picture = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))}
    net, net_xl = controlnet(sd["unet"]), controlnet(xl["unet"])
    layers = {"pag_applied_layers": pag.pop("pag_applied_layers")}
    v = {"scheduler": noise_scheduler(prediction_type="v_prediction")}
    return {
        "sdxl": Case(StableDiffusionXLPipeline(**xl), (4, 8, 8), text | size),
        "v_prediction": Case(StableDiffusionPipeline(**sd | v), (4, 8, 8), text),
        "guidance_rescale": Case(StableDiffusionPipeline(**sd), (4, 8, 8), text | {"guidance_rescale": 0.7}),
        "controlnet": Case(
            StableDiffusionControlNetPipeline(**sd, controlnet=net), (4, 8, 8), text | picture
        ),
        "sdxl_controlnet": Case(
            StableDiffusionXLControlNetPipeline(**xl, controlnet=net_xl), (4, 8, 8), text | picture | size
        ),
        "pag": Case(
            StableDiffusionPAGPipeline(**sd, **layers), (4, 8, 8), text | pag | {"pag_adaptive_scale": 0.0}
        ),
        "sdxl_pag": Case(StableDiffusionXLPAGPipeline(**xl, **layers), (4, 8, 8), text | pag | size),
    }


NAMES = ("sdxl", "v_prediction", "guidance_rescale", "controlnet", "sdxl_controlnet", "pag", "sdxl_pag")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return pipelines(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("kind", ["plugin", "wide2"])
@pytest.mark.parametrize("name", NAMES)
def test_pipelines_with_a_noise_schedule(cases, name, kind, tmp_path):
    case = cases[name]
    config = noise_scheduler(prediction_type="v_prediction" if name == "v_prediction" else "epsilon").config
    path = random_table(kind, noise_nodes(config), tmp_path, "ldm")
    predictor = load_predictor(path)
    actual = case.latents(
        EPDScheduler.from_predictor(path, config=config), predictor.cost().evaluations, case.noise()
    )
    expected = own_latents(predictor, velocity_of(case, config), case.noise())
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_modular_pipeline_of_stable_diffusion_3(digits, kind, tmp_path):
    """Its guider counts network calls: it would switch guidance off too early if the order were not 1."""
    backend = digits["sd3"]
    path = random_table(kind, flowmatch(4, shift=backend.flow_shift), tmp_path, "sd3")
    predictor, case = load_predictor(path), digits_case(backend, "sd3")
    calls = predictor.cost().evaluations
    scheduler = EPDScheduler.from_predictor(path, config=backend.pipe.scheduler.config)
    modular = modular_sd3(case.pipe, scheduler)
    expected = case.latents(scheduler, calls, case.noise(2))
    options = {k: v for k, v in case.options.items() if k != "guidance_scale"}
    options["negative_prompt"] = ""
    actual = modular(**options, num_inference_steps=calls, latents=case.noise(2), output="latents")
    assert (actual - expected).abs().max() < CLOSE
