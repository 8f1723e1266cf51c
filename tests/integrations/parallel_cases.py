"""The pipelines of the tests of enable_parallel_points, run one point a call and all at once."""

import torch
from cases import Case, noise_scheduler
from diffusers import (
    FluxPipeline,
    MultiControlNetModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from reference import random_table
from scheduler_cases import noise_nodes

from integrations.diffusers import EPDScheduler, disable_parallel_points, enable_parallel_points
from solvers import flowmatch, load_predictor

CONFIG = noise_scheduler().config


TEXT = {"prompt": ["a cat", "the dog"], "guidance_scale": 4.0}


SIZE = {"height": 64, "width": 64}


PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))


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
