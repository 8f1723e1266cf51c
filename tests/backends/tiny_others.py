"""Sana, AuraFlow, Lumina-Image 2.0 and Chroma with random weights and tiny widths, made without a network."""

from collections.abc import Callable
from pathlib import Path

import diffusers as d
import torch
from tiny_flow import make_t5, make_t5_tokenizer, make_vae
from transformers import Gemma2Config, Gemma2Model

WIDTH = 16


def make_gemma(tokenizer) -> Gemma2Model:
    """A Gemma 2 of two layers."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    words |= {"bos_token_id": None}
    heads = {"num_key_value_heads": 1, "head_dim": 8}
    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **sizes, **words, **heads))


def make_kl(channels: int, scaling: float = 0.5, shift: float | None = None) -> d.AutoencoderKL:
    """Four levels: 8 pixels a latent."""
    return d.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def make_dc(channels: int) -> d.AutoencoderDC:
    """Sana's deep-compression autoencoder with two levels: 4 pixels a latent, where the real one has 32."""
    return d.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def sana_network(size: int) -> d.SanaTransformer2DModel:
    return d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=size,
    )


def sana(words) -> d.SanaPipeline:
    network = sana_network(16)
    scheduler = d.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return d.SanaPipeline(words, make_gemma(words), make_dc(4), network, scheduler)


def aura_flow_network(width: int) -> d.AuraFlowTransformer2DModel:
    return d.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=width,
        pos_embed_max_size=16,
    )


def aura_flow(words) -> d.AuraFlowPipeline:
    network = aura_flow_network(32)
    vae = make_kl(4)
    vae.register_to_config(force_upcast=True)
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return d.AuraFlowPipeline(words, make_t5(words, 32), vae, network, scheduler)


def lumina2_network() -> d.Lumina2Transformer2DModel:
    return d.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 128, 128),
        cap_feat_dim=WIDTH,
    )


def lumina2(words) -> d.Lumina2Pipeline:
    network = lumina2_network()
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return d.Lumina2Pipeline(network, scheduler, make_kl(4, 0.3611, 0.1159), make_gemma(words), words)


def chroma(words) -> d.ChromaPipeline:
    network = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return d.ChromaPipeline(scheduler, make_vae(0.3611, 0.1159, 64), make_t5(words, 32), words, network)


MAKERS: dict[str, Callable] = {"sana": sana, "aura_flow": aura_flow, "lumina2": lumina2, "chroma": chroma}


def save_other(name: str, folder: Path) -> Path:
    """Write a tiny pipeline of a family; always the same weights, none of them 0."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    pipe = MAKERS[name](make_t5_tokenizer(folder / "words"))
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if not parameter.any():  # so that no part of a network is without effect
                parameter.normal_(0, 0.1)
    pipe.save_pretrained(folder / "pipeline")
    torch.set_rng_state(state)
    return folder / "pipeline"
