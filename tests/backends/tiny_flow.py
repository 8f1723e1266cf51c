"""Stable Diffusion 3 and FLUX.1 with random weights and tiny widths, made without a network."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny import make_text_encoder, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def make_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A Unigram tokenizer of single characters and a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(c, -6.0) for c in string.ascii_letters + string.digits + string.punctuation]
    pieces += [("▁" + word, -3.0) for word in ("a", "the", "photo", "of", "cat", "dog")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**special, "extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"})
    )
    return T5TokenizerFast.from_pretrained(folder)


def make_t5(tokenizer, width: int) -> T5EncoderModel:
    config = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, **config)
    )


def make_projected_clip(tokenizer, width: int) -> CLIPTextModelWithProjection:
    words = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }
    return CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **sizes, **words)
    )


def make_vae(scaling: float, shift: float, sample_size: int) -> AutoencoderKL:
    """Four levels: 8 pixels a latent, 16 channels."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes = {
        "latent_channels": 16,
        "block_out_channels": (8,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": sample_size,
    }
    return AutoencoderKL(
        3,
        3,
        down,
        up,
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **sizes,
    )


SD35 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
"""Stable Diffusion 3.5 medium's; large has no dual attention."""


def save_sd3(folder: Path, shift: float = 3.0, t5: bool = True, pixels: int = 64, **network) -> Path:
    """Write a tiny StableDiffusion3Pipeline of `pixels` a side; always the same weights. `network` has more
    arguments of its transformer, such as SD35.
    """
    state = torch.get_rng_state()
    torch.manual_seed(0)
    words, words3 = make_tokenizer(folder / "words"), make_t5_tokenizer(folder / "words3")
    transformer = SD3Transformer2DModel(
        sample_size=pixels // 8,
        patch_size=network.pop("patch_size", 2),
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=96,
        **network,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=make_vae(1.5305, 0.0609, pixels),
        text_encoder=make_projected_clip(words, 16),
        tokenizer=words,
        text_encoder_2=make_projected_clip(words, 32),
        tokenizer_2=words,
        text_encoder_3=make_t5(words3, 64) if t5 else None,
        tokenizer_3=words3 if t5 else None,
    ).save_pretrained(folder / "pipeline")
    torch.set_rng_state(state)
    return folder / "pipeline"


def save_flux(
    folder: Path, guidance_embeds: bool = True, pixels: int = 64, heads: int = 2, schnell: bool = False
) -> Path:
    """Write a tiny FluxPipeline of `pixels` a side; always the same weights. FLUX.1-schnell's has no guidance
    embedding, and times that are not shifted.
    """
    state = torch.get_rng_state()
    torch.manual_seed(0)
    words, words2 = make_tokenizer(folder / "words"), make_t5_tokenizer(folder / "words2")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds and not schnell,
        axes_dims_rope=(4, 4, 8),
    )
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell, **shifts
        ),
        vae=make_vae(0.3611, 0.1159, pixels),
        text_encoder=make_text_encoder(words),
        tokenizer=words,
        text_encoder_2=make_t5(words2, 32),
        tokenizer_2=words2,
        transformer=transformer,
    ).save_pretrained(folder / "pipeline")
    torch.set_rng_state(state)
    return folder / "pipeline"
