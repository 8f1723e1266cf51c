"""enable_parallel_points: all points of a level in one call give what one point a call gives."""

import pytest
import torch
from cases import Case, controlnet, noise_scheduler, sd_parts, sdxl_parts
from diffusers import (
    FluxPipeline,
    MultiControlNetModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from reference import CLOSE, random_table
from test_scheduler import noise_nodes
from tiny_flow import save_flux, save_sd3

from integrations.diffusers import EPDScheduler, disable_parallel_points, enable_parallel_points
from solvers import flowmatch, load_predictor

CONFIG = noise_scheduler().config
TEXT = {"prompt": ["a cat", "the dog"], "guidance_scale": 4.0}
SIZE = {"height": 64, "width": 64}
PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))
KINDS = ["epd", "plugin", "tableau2", "wide2"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    components = {"sd": sd_parts(folder / "sd"), "sdxl": sdxl_parts(folder / "xl")}
    components["controlnet"] = controlnet(components["sd"]["unet"])
    torch.manual_seed(3)
    components["inpainting unet"] = UNet2DConditionModel.from_config(
        components["sd"]["unet"].config, in_channels=9
    )
    components["sd3"] = StableDiffusion3Pipeline.from_pretrained(save_sd3(folder / "sd3")).components
    components["flux"] = FluxPipeline.from_pretrained(save_flux(folder / "flux")).components
    return components


def build(name: str, parts: dict) -> Case:
    """A pipeline of two images; modules are shared, as hooks go away with disable_parallel_points."""
    sd, shape = parts["sd"], (4, 8, 8)
    net, picture = parts["controlnet"], {"image": PICTURE.expand(2, -1, -1, -1)}
    half = torch.ones(1, 1, 64, 64)
    half[..., :32] = 0
    length = {"max_sequence_length": 8}
    pag = {"pag_scale": 3.0, "pag_adaptive_scale": 0.0}
    flux = {k: v for k, v in parts["flux"].items() if k not in ("image_encoder", "feature_extractor")}
    return {
        "sd": lambda: Case(StableDiffusionPipeline(**sd), shape, TEXT),
        "no guidance": lambda: Case(StableDiffusionPipeline(**sd), shape, TEXT | {"guidance_scale": 1.0}),
        "v_prediction": lambda: Case(StableDiffusionPipeline(**sd), shape, TEXT),
        "guidance_rescale": lambda: Case(
            StableDiffusionPipeline(**sd), shape, TEXT | {"guidance_rescale": 0.7}
        ),
        "sdxl": lambda: Case(StableDiffusionXLPipeline(**parts["sdxl"]), shape, TEXT | SIZE),
        "sd3": lambda: Case(StableDiffusion3Pipeline(**parts["sd3"]), (16, 8, 8), TEXT | SIZE | length),
        "flux": lambda: Case(FluxPipeline(**flux), (16, 64), TEXT | SIZE | length),
        "flux true cfg": lambda: Case(
            FluxPipeline(**flux),
            (16, 64),
            TEXT | SIZE | length | {"negative_prompt": ["a", "b"], "true_cfg_scale": 2.0},
        ),
        "controlnet": lambda: Case(
            StableDiffusionControlNetPipeline(**sd, controlnet=net), shape, TEXT | picture
        ),
        "guess mode": lambda: Case(
            StableDiffusionControlNetPipeline(**sd, controlnet=net),
            shape,
            TEXT | picture | {"guess_mode": True},
        ),
        "two controlnets": lambda: Case(
            StableDiffusionControlNetPipeline(**sd, controlnet=MultiControlNetModel([net, net])),
            shape,
            TEXT | {"image": [picture["image"]] * 2, "controlnet_conditioning_scale": [0.7, 0.4]},
        ),
        "pag": lambda: Case(StableDiffusionPAGPipeline(**sd, pag_applied_layers=["mid"]), shape, TEXT | pag),
        "inpainting": lambda: Case(
            StableDiffusionInpaintPipeline(**sd),
            shape,
            TEXT | picture | {"mask_image": torch.ones(1, 1, 64, 64), "strength": 1.0},
        ),
        "inpainting unet": lambda: Case(
            StableDiffusionInpaintPipeline(**sd | {"unet": parts["inpainting unet"]}),
            shape,
            TEXT | picture | {"mask_image": half, "strength": 1.0},
        ),
    }[name]()


NAMES = [
    "sd",
    "no guidance",
    "v_prediction",
    "guidance_rescale",
    "sdxl",
    "sd3",
    "flux",
    "flux true cfg",
    "controlnet",
    "guess mode",
    "two controlnets",
    "pag",
    "inpainting",
    "inpainting unet",
]


def scheduler_for(name: str, parts: dict, kind: str, folder) -> tuple[EPDScheduler, object]:
    family = name.split()[0]
    if family in ("sd3", "flux"):
        nodes = flowmatch(3, shift=3.0) if family == "sd3" else flowmatch(3, mu=0.459375)
        config = parts[family]["scheduler"].config
    else:
        config = noise_scheduler(prediction_type=name if name == "v_prediction" else "epsilon").config
        nodes, family = noise_nodes(config, 3), "ldm"
    path = random_table(kind, nodes, folder, family)
    return EPDScheduler.from_predictor(path, config=config), load_predictor(path).cost()


def sequential_and_parallel(case, scheduler, cost, **options):
    plain = case.latents(scheduler, cost.evaluations, case.noise(2), **options)
    enable_parallel_points(case.pipe)
    try:
        return plain, case.latents(scheduler, cost.depth, case.noise(2), **options)
    finally:
        disable_parallel_points(case.pipe)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_kinds_of_table(parts, name, kind, tmp_path):
    case, (scheduler, cost) = build(name, parts), scheduler_for(name, parts, kind, tmp_path)
    calls, network = [], case.pipe.components.get("unet") or case.pipe.transformer
    hook = network.register_forward_pre_hook(lambda m, a, k: calls.append(1), with_kwargs=True)
    plain, parallel = sequential_and_parallel(case, scheduler, cost)
    hook.remove()
    assert (plain - parallel).abs().max() < CLOSE * max(1.0, plain.abs().max())
    assert len(calls) == cost.evaluations + cost.depth
    assert cost.depth < cost.evaluations


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sd", "sd3", "flux")])
def test_pipelines(parts, name, tmp_path):
    case, (scheduler, cost) = build(name, parts), scheduler_for(name, parts, "wide2", tmp_path)
    plain, parallel = sequential_and_parallel(case, scheduler, cost)
    assert (plain - parallel).abs().max() < CLOSE * max(1.0, plain.abs().max())
