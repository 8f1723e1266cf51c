"""What the tests of EPDScheduler share: kinds of tables, shipped ones, pipelines of the embedded backbones,
broken tables.
"""

import torch
from cases import Case
from diffusers import FluxPipeline, ModularPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from reference import alphas_of

from solvers import NoiseSchedule, discrete

KINDS = ("epd", "plugin", "tableau1", "tableau2", "wide2")


SHIPPED = {
    ("ldm", "epd"): "epd-g7.5-d4",
    ("ldm", "plugin"): "plugin-g7.5-d6",
    ("ldm", "tableau1"): "tableau1-g7.5-d6",
    ("ldm", "tableau2"): "tableau2-g7.5-d6",
    ("ldm", "wide2"): "wide2-g7.5-d4",
    ("sd3", "epd"): "epd-g4.5-d4",
    ("flux", "epd"): "epd-g3.5-d4",
}


GUIDANCE = {"ldm": 7.5, "sd3": 4.5, "flux": 3.5}


PROMPTS = ["a bold red handwritten three", "a thin green seven"]


def digits_case(backend, family: str) -> Case:
    """diffusers' own pipeline on the networks of an embedded backbone."""
    parts = backend.pipe.components | ({"requires_safety_checker": False} if family == "ldm" else {})
    kind = {"ldm": StableDiffusionPipeline, "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}[family]
    length = {"ldm": {}, "sd3": {"max_sequence_length": 4}, "flux": {"max_sequence_length": 16}}[family]
    factor = backend.pipe.vae_scale_factor
    size = {"height": backend.latent_shape[1] * factor, "width": backend.latent_shape[2] * factor}
    options = {"prompt": PROMPTS, "guidance_scale": GUIDANCE[family]} | length | size
    return Case(kind(**parts), backend.latent_shape, options)


def noise_nodes(config, count: int = 4) -> torch.Tensor:

    return discrete(count, NoiseSchedule(alphas_of(config)))


def modular_sd3(pipe, scheduler) -> ModularPipeline:
    """The modular pipeline of the same parts, without a decoder."""
    from diffusers import ClassifierFreeGuidance
    from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

    blocks = StableDiffusion3AutoBlocks()
    modular = blocks.init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=GUIDANCE["sd3"])
    modular.update_components(**pipe.components | {"scheduler": scheduler, "guider": guider})
    return modular


BROKEN = {
    "not a dict": (lambda t: 3, r"tables\['6'\] is 3, expected a dict"),
    "a key less": (lambda t: t.pop("levels") and t, "expected the keys sigmas, stages"),
    "a key more": (lambda t: t | {"code": "import os"}, "expected the keys sigmas, stages"),
    "not a number": (
        lambda t: t["stages"][1].__setitem__(0, float("nan")) or t,
        "stages is .*expected 6 x 7 finite",
    ),
    "infinite": (
        lambda t: t["output"].__setitem__(0, float("inf")) or t,
        "output is .*expected 7 finite numbers",
    ),
    "a huge integer": (
        lambda t: t["output"].__setitem__(0, 10**400) or t,
        "output is .*expected 7 finite numbers",
    ),
    "a string": (lambda t: t["sigmas"].__setitem__(2, "1.0") or t, "sigmas is .*expected n finite numbers"),
    "a bool": (lambda t: t["sigmas"].__setitem__(2, True) or t, "sigmas is .*expected n finite numbers"),
    "nothing": (lambda t: t | {"sigmas": []}, r"sigmas is \[\], expected n finite numbers"),
    "too much": (lambda t: t | {"sigmas": [1.0] * 2000}, "sigmas is .*expected n finite numbers"),
    "another count": (lambda t: t["sigmas"].pop() and t, "is '6', expected its number of stages, 5"),
    "ragged": (lambda t: t["stages"][2].pop() is None or t, "stages is .*expected 6 x 7 finite numbers"),
    "below 0": (
        lambda t: t["sigmas"].__setitem__(2, -1.0) or t,
        "sigmas is -1.0, expected noise levels above 0",
    ),
    "nodes": (lambda t: t | {"nodes": [1.0]}, "nodes is .*expected noise levels"),
    "starts": (lambda t: t | {"starts": [1, 2]}, r"starts is \[1, 2\], expected a stage, or -1"),
    "a start of text": (lambda t: t | {"starts": [0, "3"]}, "starts is .*expected a stage, or -1"),
    "levels": (
        lambda t: t | {"levels": [[0], [1, 2], [3], [4, 4]]},
        "levels is .*expected lists that hold the stages 0 to 5",
    ),
    "a level of text": (
        lambda t: t | {"levels": "012345"},
        "levels is .*expected lists that hold the stages 0 to 5",
    ),
    "one level": (
        lambda t: t | {"levels": [[0, 1, 2, 3, 4, 5]]},
        "levels is .*a velocity of its own or a later level",
    ),
    "its own velocity": (
        lambda t: t["stages"][3].__setitem__(4, 0.1) or t,
        "a velocity of its own or a later level",
    ),
    "no start": (
        lambda t: t["stages"][0].__setitem__(0, 0) or t,
        "expected a first stage that is a multiple of the start",
    ),
}
