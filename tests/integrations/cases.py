"""Pipelines of diffusers with random weights and tiny widths, each with the arguments of one call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import torch
from tiny import make_text_encoder, make_tokenizer, make_unet, make_vae
from tiny_flow import make_projected_clip
from tiny_others import aura_flow_network, lumina2_network, sana_network
from tiny_sdxl import make_sdxl_unet

WORDS = 6


@dataclass
class Case:
    """A pipeline, the shape of one image's latents as it takes them, and the arguments of a call."""

    pipe: Any
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.pipe.set_progress_bar_config(disable=True)

    def noise(self, images: int = 1) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(7 + i) for i in range(images)]
        return torch.stack([torch.randn(self.shape, generator=seed) for seed in seeds])

    def latents(self, scheduler, steps: int, noise: torch.Tensor | None, **options) -> torch.Tensor:
        """What the pipeline makes of noise, or of noise of its own, with a scheduler."""
        self.pipe.scheduler = scheduler
        start = {} if noise is None else {"latents": noise.clone()}
        start["generator"] = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": steps, "output_type": "latent"} | start | self.options | options
        return self.pipe(**options)[0]


def flow_scheduler(**options) -> d.FlowMatchEulerDiscreteScheduler:
    return d.FlowMatchEulerDiscreteScheduler(**options)


def noise_scheduler(**options) -> d.DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return d.DDIMScheduler(**betas | options, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def embeds(width: int, rows: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, WORDS, width, generator=torch.Generator().manual_seed(seed))


def mask(rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, WORDS, dtype=torch.long)


def pairs(width: int, masks: str | None = "prompt_attention_mask") -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and a negative prompt, with their masks."""
    embeddings = {"prompt_embeds": embeds(width), "negative_prompt_embeds": embeds(width, seed=4)}
    return embeddings | ({masks: mask(), f"negative_{masks}": mask()} if masks else {})


def sd_parts(folder) -> dict:
    torch.manual_seed(0)
    words = make_tokenizer(folder / "words")
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(words),
        "tokenizer": words,
        "unet": make_unet(),
    }
    return parts | none | {"scheduler": noise_scheduler()}


def sdxl_parts(folder) -> dict:
    torch.manual_seed(0)
    words = make_tokenizer(folder / "words")
    unet = make_sdxl_unet(64, 1)
    encoders = {"text_encoder": make_text_encoder(words), "text_encoder_2": make_projected_clip(words, 48)}
    tokenizers = {"tokenizer": words, "tokenizer_2": words}
    return {"unet": unet, "vae": make_vae(), "scheduler": noise_scheduler()} | encoders | tokenizers


def controlnet(unet) -> d.ControlNetModel:
    """A ControlNet of a U-Net whose zero convolutions are not zero, so that it has an effect."""
    torch.manual_seed(1)
    net = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    for block in [
        *net.controlnet_down_blocks,
        net.controlnet_mid_block,
        net.controlnet_cond_embedding.conv_out,
    ]:
        torch.nn.init.normal_(block.weight, std=0.2)
    return net


def aura_flow() -> Case:
    net = aura_flow_network(16)
    pipe = d.AuraFlowPipeline(None, None, None, net, flow_scheduler(shift=1.73))
    return Case(pipe, (4, 8, 8), pairs(16) | {"height": 64, "width": 64})


def sana() -> Case:
    net = sana_network(8)
    pipe = d.SanaPipeline(None, None, None, net, flow_scheduler(shift=3.0))
    size = {"height": 256, "width": 256, "use_resolution_binning": False, "negative_prompt": None}
    return Case(pipe, (4, 8, 8), pairs(16) | size)


def pixart() -> Case:
    net = d.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    scheduler = d.EulerDiscreteScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    size = {"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None}
    return Case(d.PixArtAlphaPipeline(None, None, None, net, scheduler), (4, 8, 8), pairs(16) | size)


def lumina2() -> Case:
    net = lumina2_network()
    pipe = d.Lumina2Pipeline(net, flow_scheduler(shift=6.0), None, None, None)
    return Case(pipe, (4, 8, 8), pairs(16) | {"height": 64, "width": 64})


def hunyuan_dit() -> Case:
    net = d.HunyuanDiT2DModel(
        sample_size=8,
        in_channels=4,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=WORDS,
        text_len_t5=WORDS,
    )
    scheduler = d.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    pipe = d.HunyuanDiTPipeline(None, None, None, net, scheduler, None, None, False, None, None)
    two = {f"{k}_2": v for k, v in pairs(16).items()}
    return Case(
        pipe, (4, 8, 8), pairs(16) | two | {"height": 64, "width": 64, "use_resolution_binning": False}
    )


def qwen_image() -> Case:
    net = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    pipe = d.QwenImagePipeline(flow_scheduler(use_dynamic_shifting=True), None, None, None, net)
    return Case(pipe, (16, 16), pairs(16, "prompt_embeds_mask") | {"height": 64, "width": 64})


def z_image() -> Case:
    net = d.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = d.ZImagePipeline(flow_scheduler(shift=3.0), None, None, None, net)
    text = {"prompt_embeds": [embeds(16)[0]], "negative_prompt_embeds": [embeds(16, seed=4)[0]]}
    return Case(pipe, (4, 8, 8), text | {"height": 64, "width": 64})


def chroma() -> Case:
    net = d.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=16,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipe = d.ChromaPipeline(flow_scheduler(shift=1.0), None, None, None, net)
    options = pairs(16) | {
        "prompt_attention_mask": mask().float(),
        "negative_prompt_attention_mask": mask().float(),
    }
    return Case(pipe, (16, 16), options | {"height": 64, "width": 64})


def ltx() -> Case:
    net = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    pipe = d.LTXPipeline(flow_scheduler(use_dynamic_shifting=True), None, None, None, net)
    return Case(pipe, (16, 8), pairs(16) | {"height": 128, "width": 128, "num_frames": 1})


OTHERS: dict[str, Callable[[], Case]] = {
    build.__name__: build
    for build in (aura_flow, sana, pixart, lumina2, hunyuan_dit, qwen_image, z_image, chroma, ltx)
}
