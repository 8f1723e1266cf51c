"""Stable Diffusion 1.5 with random weights and tiny widths, made without a network, and spies on its
calls.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from backends import load_backend
from solvers import Spec

PROMPTS = ["a cat", "the dog, 8k!", "a photo of nothing"]
CPU = torch.device("cpu")
WIDTH, TOKENS = 32, 77


def byte_symbols() -> list[str]:
    """The printable character that CLIP's byte-level BPE writes for each of the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with two merged words; every byte is a token, so that no prompt holds an
    unknown one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    symbols, end = byte_symbols(), "<|endoftext|>"
    vocab = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), "<|startoftext|>", end]
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    config = {**special, "model_max_length": TOKENS, "tokenizer_class": "CLIPTokenizer"}
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text transformer of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet(sample_size: int = 8) -> UNet2DConditionModel:
    """A U-Net with text cross-attention at its lower level."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def make_vae() -> AutoencoderKL:
    """Four levels, as in the real one: 8 pixels a latent."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    )


def make_scheduler(**changes) -> DDIMScheduler:
    """Stable Diffusion 1.5's training schedule."""
    betas = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **changes)


def save_tiny(folder: Path, pixels: int = 64) -> Path:
    """Write a pipeline of `pixels` a side in diffusers' folder layout; always the same weights."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "words")
    parts = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": make_unet(pixels // 8),
    }
    torch.set_rng_state(state)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, scheduler=make_scheduler(), **none).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def load_tiny(folder: Path, dtype=None, **options):
    """The ldm backend of a folder, on the CPU."""
    return load_backend(
        Spec(backend="ldm", backend_config={"model_name_or_path": str(folder), **options}), CPU, dtype
    )


@contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[tuple[tuple, dict]]]:
    """The arguments of each call of a module while the context is open."""
    calls: list[tuple[tuple, dict]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def states(n: int, shape=(4, 8, 8), seed: int = 5) -> torch.Tensor:
    """Float32 states [n, *shape] as large as those at sigma 3."""
    return 3 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
