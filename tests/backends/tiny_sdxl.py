"""Stable Diffusion XL and Playground v2.5 with random weights and tiny widths, made without a network."""

from pathlib import Path

import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import make_text_encoder, make_tokenizer, make_vae
from tiny_flow import make_projected_clip

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, STD = [-1.6, 1.2, 0.4, -0.7], [8.4, 5.9, 6.3, 5.2]


def make_sdxl_unet(pixels: int, layers: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=pixels // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=layers,
        projection_class_embeddings_input_dim=48 + 6 * 8,
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
    )


def save_sdxl(
    folder: Path, prediction: str = "epsilon", edm: bool = False, pixels: int = 64, zeros: bool = True
) -> Path:
    """Write a tiny StableDiffusionXLPipeline of `pixels` a side; always the same weights.

    Args:
        folder: where.
        prediction: of its scheduler.
        edm: with Playground v2.5's scheduler and latents.
        pixels: a side.
        zeros: whether the empty negative prompt is zeros.
    """
    state = torch.get_rng_state()
    torch.manual_seed(0)
    words, vae = make_tokenizer(folder / "words"), make_vae()
    vae.register_to_config(scaling_factor=0.13025, force_upcast=True)
    if edm:
        vae.register_to_config(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
        scheduler = EDMDPMSolverMultistepScheduler(prediction_type=prediction)
    else:
        scheduler = EulerDiscreteScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing="leading", steps_offset=1
        )
    StableDiffusionXLPipeline(
        vae,
        make_text_encoder(words),
        make_projected_clip(words, 48),
        words,
        words,
        make_sdxl_unet(pixels, 1),
        scheduler,
        force_zeros_for_empty_prompt=zeros,
    ).save_pretrained(folder / "pipeline")
    torch.set_rng_state(state)
    return folder / "pipeline"
