"""Makes the tiny pipelines importable, and the learned tables of a name wherever they lie under exps."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "backends")]

import pytest  # noqa: E402
import torch  # noqa: E402
from cases import controlnet, sd_parts, sdxl_parts  # noqa: E402
from diffusers import FluxPipeline, StableDiffusion3Pipeline, UNet2DConditionModel  # noqa: E402
from reference import table_file  # noqa: E402
from tiny import CPU  # noqa: E402
from tiny_flow import save_flux, save_sd3  # noqa: E402

from backends import load_backend  # noqa: E402
from solvers import Spec, load_predictor  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def single_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    """The embedded backbones by family."""
    families = {"ldm": {}, "sd3": {"family": "sd3"}, "flux": {"family": "flux"}}
    return {
        name: load_backend(Spec(backend="digits", backend_config=options), CPU)
        for name, options in families.items()
    }


@pytest.fixture(scope="session")
def learned():
    """A learned predictor of a name such as epd-g7.5-d4, and its file."""
    return lambda name: (load_predictor(table_file(name)), table_file(name))


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
