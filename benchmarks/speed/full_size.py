"""The real models' layouts with random weights, from folder to image, and what they need.

    python -m benchmarks.speed.full_size FAMILY [--layers N]

Nothing is downloaded. The folder has the layout of the published ones, as transformers 4 wrote it. On a GPU
all layers fit; --layers cuts the transformers and text encoders short where memory demands.
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)
from transformers.initialization import no_init_weights

from backends import load_backend
from common.errors import run_command
from digits import FOLDER
from digits.data import ALL_LABELS, random_caption
from digits.flow_models import make_t5_tokenizer
from generation.generate import Sampler
from solvers import Euler, Spec

from ..report import device_name, write_json

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}  # diffusers' defaults are Stable Diffusion 1.5's
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SD3 = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX = {
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5 = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
CLASSES = {"ldm": StableDiffusionPipeline, "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}


def parts_of(family: str, layers: int | None, pixels: int) -> dict[str, Callable[[], nn.Module]]:
    """What makes each network of a family for images of some pixels a side; `layers` cuts the transformers,
    not the U-Net.
    """

    def cut(full: int) -> int:
        return full if layers is None else min(layers, full)

    clip = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    words = {
        "bos_token_id": clip.bos_token_id,
        "eos_token_id": clip.eos_token_id,
        "pad_token_id": clip.pad_token_id,
    }

    def text(sizes: dict, full: int, cls=CLIPTextModelWithProjection) -> Callable[[], nn.Module]:
        return lambda: cls(CLIPTextConfig(vocab_size=49408, num_hidden_layers=cut(full), **sizes, **words))

    def vae(channels: int, scale: float, shift: float | None) -> Callable[[], nn.Module]:
        factors = {
            "latent_channels": channels,
            "scaling_factor": scale,
            "shift_factor": shift,
            "sample_size": pixels,
        }
        factors |= {"use_quant_conv": shift is None, "use_post_quant_conv": shift is None}
        return lambda: AutoencoderKL(**VAE, **factors)

    def t5() -> nn.Module:
        return T5EncoderModel(T5Config(**T5, num_layers=cut(24)))

    if family == "ldm":
        unet = partial(UNet2DConditionModel, **UNET, sample_size=pixels // 8)
        return {"unet": unet, "vae": vae(4, 0.18215, None), "text_encoder": text(CLIP_L, 12, CLIPTextModel)}
    if family == "sd3":
        encoders = {
            "text_encoder": text(CLIP_L, 12),
            "text_encoder_2": text(CLIP_G, 32),
            "text_encoder_3": t5,
        }
        transformer = partial(SD3Transformer2DModel, **SD3, num_layers=cut(24), sample_size=pixels // 8)
        return {"transformer": transformer, "vae": vae(16, 1.5305, 0.0609), **encoders}
    depth = {"num_layers": cut(19), "num_single_layers": cut(38)}
    encoders = {"text_encoder": text(CLIP_L, 12, CLIPTextModel), "text_encoder_2": t5}
    return {
        "transformer": partial(FluxTransformer2DModel, **FLUX, **depth),
        "vae": vae(16, 0.3611, 0.1159),
        **encoders,
    }


def randomised(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A network with random weights, drawn once and in its number type, so that it never needs the memory of
    another.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            network = make()
        if isinstance(network, PreTrainedModel):
            network.tie_weights()  # which is part of the initialisation left out
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.02)
    return network.to(dtype)


def save_network(network: nn.Module, folder: Path) -> None:
    """Its weights; a CLIP text encoder's with the names that its published files have."""
    network.save_pretrained(folder)
    if isinstance(network, CLIPTextModel | CLIPTextModelWithProjection):
        path = folder / "model.safetensors"
        names = {
            k: k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}"
            for k in load_file(path)
        }
        save_file({names[k]: v for k, v in load_file(path).items()}, path, {"format": "pt"})


def scheduler_of(family: str) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """A scheduler as the family's published one, as far as noise levels go."""
    if family == "ldm":
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        return DDIMScheduler(**betas, steps_offset=1, clip_sample=False)
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux", **shifts)


def tokenizer_of(t5: bool, folder: Path) -> PreTrainedTokenizerBase:
    """The digits' CLIP tokenizer, or a T5 tokenizer that is made in a folder."""
    if not t5:
        return CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    return make_t5_tokenizer([random_caption(c, generator) for c in ALL_LABELS], folder)


def in_memory(
    family: str, layers: int | None, pixels: int, device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """The pipeline with random weights made on the device, without a folder."""
    with torch.device(device):
        parts = {name: randomised(make, dtype) for name, make in parts_of(family, layers, pixels).items()}
    with tempfile.TemporaryDirectory() as tmp:
        for encoder in [n for n in parts if n.startswith("text_encoder")]:
            t5 = isinstance(parts[encoder], T5EncoderModel)
            parts[encoder.replace("text_encoder", "tokenizer")] = tokenizer_of(t5, Path(tmp))
    if family == "ldm":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return CLASSES[family](scheduler=scheduler_of(family), **parts)


def save_folder(family: str, layers: int | None, pixels: int, folder: Path) -> dict[str, int]:
    """Write the pipeline's folder; the parameters of each network."""
    index: dict = {"_class_name": CLASSES[family].__name__, "_diffusers_version": "0.30.0"}
    counts = {}
    for name, make in parts_of(family, layers, pixels).items():
        network = randomised(make, torch.float16)
        counts[name] = sum(p.numel() for p in network.parameters())
        save_network(network, folder / name)
        index[name] = ["transformers" if name.startswith("text") else "diffusers", type(network).__name__]
        del network
    if family == "ldm":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    scheduler = scheduler_of(family)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    for encoder in [n for n in counts if n.startswith("text_encoder")]:
        name, t5 = encoder.replace("text_encoder", "tokenizer"), index[encoder][1] == "T5EncoderModel"
        tokenizer_of(t5, folder / name).save_pretrained(folder / name)
        index[name] = ["transformers", "T5TokenizerFast" if t5 else "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
    return counts


@click.command()
@click.argument("family", type=click.Choice(list(CLASSES)))
@click.option(
    "--layers", type=click.IntRange(1), help="Of the transformers and the text encoders; all by default."
)
@click.option(
    "--resolution",
    type=click.IntRange(64),
    help="Pixels a side, a multiple of 64; 512 for ldm by default, else 1024.",
)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    family: str, layers: int | None, resolution: int | None, dtype: str, device: str, out: Path | None
) -> None:
    """Build, save, load, encode, two solver steps, decode; prints parameters, seconds and peak memory."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        counts = save_folder(family, layers, resolution or (512 if family == "ldm" else 1024), folder)
        config = {"model_name_or_path": str(folder)}
        begun = time.perf_counter()
        backend = load_backend(Spec(backend=family, backend_config=config), device, dtype)
        loaded = time.perf_counter() - begun
        nodes = backend.sigmas(Spec(num_steps=3))
        begun = time.perf_counter()
        image = Sampler(backend, Euler(), "euler", nodes, backend.default_guidance).images(
            ["a bold red handwritten seven"], [0]
        )
        seconds = time.perf_counter() - begun
    if not image.isfinite().all():
        raise AssertionError("the image is not finite")
    row = {
        "family": family,
        "layers": layers,
        "pixels": image.shape[-1],
        "dtype": dtype,
        "parameters": counts,
    }
    row |= {"seconds_to_load": loaded, "seconds_for_two_steps": seconds, "peak_gigabytes": peak()}
    if torch.device(device).type == "cuda":
        row["peak_device_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    click.echo(json.dumps(row))
    if out is not None:
        write_json(out, {"device": device_name(torch.device(device))}, [row], torch.device(device))


def peak() -> float:
    """Most resident memory of this process so far, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    run_command(main)
