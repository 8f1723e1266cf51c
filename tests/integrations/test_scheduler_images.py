"""Image to image from any node of a table, and inpainting, in unmodified pipelines."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import Case, noise_scheduler, sd_parts, sdxl_parts
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from reference import CLOSE, capture_warnings, own_latents, random_table, velocity_of
from scheduler_cases import noise_nodes
from tiny_flow import save_flux, save_sd3

from integrations.diffusers import EPDScheduler
from solvers import SolverTable, flowmatch, load_predictor, sample

KINDS = {  # text to image, image to image, inpainting
    "sd": (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline),
    "sdxl": (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline),
    "sd3": (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline),
    "flux": (FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline),
}
PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    sd3 = StableDiffusion3Pipeline.from_pretrained(save_sd3(folder / "sd3"))
    flux = FluxPipeline.from_pretrained(save_flux(folder / "flux"))
    return {
        "sd": sd_parts(folder / "sd"),
        "sdxl": sdxl_parts(folder / "xl"),
        "sd3": sd3.components,
        "flux": flux.components,
    }


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


class Setting:
    """The three pipelines of a family, and a table for it."""

    def __init__(self, name: str, parts: dict, folder, kind: str):
        flow = name in ("sd3", "flux")
        self.kinds, self.parts = KINDS[name], {k: v for k, v in parts.items() if k != "image_encoder"}
        self.shape = (16, 64) if name == "flux" else (16, 8, 8) if flow else (4, 8, 8)
        self.options = {"prompt": "a cat", "guidance_scale": 4.0, "height": 64, "width": 64}
        self.options |= {"max_sequence_length": 8} if flow else {}
        self.config = parts["scheduler"].config if flow else noise_scheduler().config
        nodes = (
            flowmatch(4, mu=0.459375)
            if name == "flux"
            else flowmatch(4, shift=3.0)
            if flow
            else noise_nodes(self.config)
        )
        self.path = random_table(kind, nodes, folder, {"sdxl": "ldm", "sd": "ldm"}.get(name, name))
        self.predictor = load_predictor(self.path)
        self.scheduler = EPDScheduler.from_predictor(self.path, config=self.config)
        self.calls = self.predictor.cost().evaluations

    def case(self, kind: int, **options) -> Case:
        more = {"requires_safety_checker": False} if "safety_checker" in self.parts else {}
        options = self.options | options
        if self.kinds[kind] in (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline):
            options = {
                k: v for k, v in options.items() if k not in ("height", "width")
            }  # the picture has them
        return Case(self.kinds[kind](**self.parts | more), self.shape, options)


def begun(scheduler) -> list[torch.Tensor]:
    """The noisy latents from which a run begins, once it is over."""
    kept, add_noise = [], scheduler.add_noise

    def spy(*args):
        kept.append(add_noise(*args))
        return kept[-1]

    scheduler.add_noise = spy
    return kept


@pytest.mark.parametrize("node", [1, 2])
def test_image_to_image_from_a_node_is_the_rest_of_the_table(name, parts, node, tmp_path):
    setting = Setting(name, parts[name], tmp_path, "epd")
    case, kept = setting.case(1, image=PICTURE, strength=(9 - 3 * node) / 9), begun(setting.scheduler)
    with capture_warnings() as messages:
        actual = case.latents(setting.scheduler, setting.calls, None)
    predictor, start = setting.predictor, kept[0]
    if name == "flux":
        start = FluxPipeline._pack_latents(start, 1, 16, 8, 8)
    table = SolverTable(**{k: v[node:] for k, v in predictor.table.arrays().items()})
    rest = replace(predictor, table=table).solver(parallel=False)
    expected = sample(rest, velocity_of(setting.case(0), setting.config), start, predictor.sigmas[node:])
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())
    assert not messages


@pytest.mark.parametrize("kind", ["epd", "tableau1"])
def test_image_to_image_from_elsewhere_takes_euler_steps(parts, kind, tmp_path):
    """From stage 1 of the table on to its next node; a whole tableau has no other node than its end."""
    setting = Setting("sd", parts["sd"], tmp_path, kind)
    tableau, calls = setting.predictor.cost(), setting.calls
    case, kept = setting.case(1, image=PICTURE, strength=1 - 1 / calls + 1e-4), begun(setting.scheduler)
    with capture_warnings() as messages:
        actual = case.latents(setting.scheduler, calls, None)
    assert ["Euler steps come first" in message for message in messages] == [True]
    velocity, nodes = velocity_of(setting.case(0), setting.config), setting.predictor.sigmas
    join = 3 if kind == "epd" else calls
    levels = [*tableau.sigmas[1:join], nodes[1] if kind == "epd" else nodes[-1]]
    expected = kept[0]
    for sigma, after in pairwise(levels):
        expected = expected + (after - sigma).item() * velocity(expected, sigma)
    if kind == "epd":
        table = SolverTable(**{k: v[1:] for k, v in setting.predictor.table.arrays().items()})
        rest = replace(setting.predictor, table=table).solver(parallel=False)
        expected = sample(rest, velocity, expected, nodes[1:])
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())


def unpacked(latents: torch.Tensor, name: str) -> torch.Tensor:
    """Latents as FLUX's inpainting takes them: not yet packed into tokens."""
    return FluxPipeline._unpack_latents(latents, 64, 64, 8) if name == "flux" else latents


@pytest.mark.parametrize("kind", ["epd", "tableau1", "wide2"])
def test_inpainting_all_of_a_picture_is_text_to_image(name, parts, kind, tmp_path):
    """The mask gives the pipeline new latents after each call, of the same values."""
    setting = Setting(name, parts[name], tmp_path, kind)
    case = setting.case(2, image=PICTURE, mask_image=torch.ones(1, 1, 64, 64), strength=1.0)
    noise = setting.case(0).noise()
    actual = case.latents(setting.scheduler, setting.calls, unpacked(noise, name))
    expected = own_latents(setting.predictor, velocity_of(setting.case(0), setting.config), noise)
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())


@pytest.mark.parametrize("kind", ["epd", "tableau1"])
def test_inpainting_keeps_what_is_not_masked(name, parts, kind, tmp_path):
    setting, mask = Setting(name, parts[name], tmp_path, kind), torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    case = setting.case(2, image=PICTURE, mask_image=mask, strength=1.0)
    noise = setting.case(0).noise()
    starts = [unpacked(noise * scale, name) for scale in (1.0, 0.9)]
    actual, other = (unpacked(case.latents(setting.scheduler, setting.calls, x), name) for x in starts)
    assert torch.equal(actual[..., 4:], other[..., 4:])  # the picture's latents, whatever the noise
    assert (actual[..., :4] - other[..., :4]).abs().max() > 1e-3


def test_an_inpainting_network_sees_the_mask_beside_the_latents(parts, tmp_path):
    setting = Setting("sd", parts["sd"], tmp_path, "epd")
    torch.manual_seed(2)
    unet = UNet2DConditionModel.from_config(setting.parts["unet"].config, in_channels=9)
    setting.parts, mask = setting.parts | {"unet": unet}, torch.ones(1, 1, 64, 64)
    mask[..., :32] = 0
    case = setting.case(2, image=PICTURE, mask_image=mask, strength=1.0)
    actual = case.latents(setting.scheduler, setting.calls, case.noise())
    expected = own_latents(setting.predictor, velocity_of(case, setting.config), case.noise())
    assert (actual - expected).abs().max() < CLOSE * max(1.0, expected.abs().max())
