"""What a user of the published system has: its downloads, its command lines, and models of the real families'
sizes (tiny, with random weights).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("backends", "solvers")]

import forked  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel  # noqa: E402
from released import TEXT_TO_IMAGE, write_released  # noqa: E402
from tiny import WIDTH, save_tiny  # noqa: E402
from tiny_flow import save_flux, save_sd3  # noqa: E402

SIZES = {"sd15": 512, "sd3-512": 512, "sd3-1024": 1024, "flux": 1024}
NAMES = [name.removeprefix("exps/") for name in TEXT_TO_IMAGE]
PYTHON = re.compile(r"((?:\w+=\S+ )*)python (?:-m )?(\S+)(.*)")


def make_models(folder: Path) -> dict[str, Path]:
    """A pipeline for each backbone, whose own size is the real one's; Stable Diffusion 3's is 1024 whichever
    size is asked for. At these sizes time goes into pixels and tokens, so the networks have few channels.
    """
    sd15, flux = save_tiny(folder / "sd15", 512), save_flux(folder / "flux", pixels=1024, heads=1)
    sd3 = save_sd3(folder / "sd3", pixels=1024, patch_size=8)
    torch.manual_seed(0)
    narrow_unet().save_pretrained(sd15 / "unet")
    narrow_flux().save_pretrained(flux / "transformer")
    for pipeline in (sd15, sd3, flux):
        narrow_vae(pipeline / "vae").save_pretrained(pipeline / "vae")
    return {"sd15": sd15, "sd3-512": sd3, "sd3-1024": sd3, "flux": flux}


def narrow_unet() -> UNet2DConditionModel:
    """Stable Diffusion's, with attention over 8 x 8 alone."""
    return UNet2DConditionModel(
        sample_size=64,
        layers_per_block=1,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownBlock2D",) * 3 + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def narrow_flux() -> FluxTransformer2DModel:
    """FLUX.1-dev's, with one block of one head over its 4096 tokens."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def narrow_vae(folder: Path) -> AutoencoderKL:
    """A pipeline's VAE with two channels and without the attention over all latents."""
    narrow = {"block_out_channels": (2,) * 4, "norm_num_groups": 2, "mid_block_add_attention": False}
    return AutoencoderKL.from_config(AutoencoderKL.load_config(folder) | narrow)


def move_in(folder: Path) -> Path:
    """The project in a folder, with the published downloads in its exps/ beside what is tracked there."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("exps", "samples", "demo", "banks", "build"):
            (folder / entry.name).symlink_to(entry)
    for tables in ("sd15", "sd3-512", "sd3-1024", "flux"):
        (folder / "exps" / tables).mkdir(parents=True)
        for tracked in (ROOT / "exps" / tables).iterdir():
            (folder / "exps" / tables / tracked.name).write_bytes(tracked.read_bytes())
    write_released(folder, TEXT_TO_IMAGE)
    return folder


def run(project: Path, command: str, *more: str, **variables: str) -> str:
    """Run a command line in the project's folder, on the CPU; what it prints.

    A single python command is run by a process that has the libraries already, any other by a shell.
    """
    variables = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    line = " ".join([command, *map(shlex.quote, more)])
    if alone := PYTHON.fullmatch(line):
        assigned, module, arguments = alone.groups()
        variables |= dict(text.split("=", 1) for text in assigned.split())
        words = shlex.split(arguments)
        done = forked.start(module.removesuffix(".py"), *words, environment=variables, cwd=project).wait(200)
    else:
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=project,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            timeout=230,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
