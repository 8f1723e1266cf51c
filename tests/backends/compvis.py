"""A diffusers pipeline's weights under the names of the original Stable Diffusion checkpoints."""

import re

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(rest: str, names: dict[str, str]) -> str:
    """rest ("norm1.weight") with its first part replaced by its name in the other layout."""
    part, _, kind = rest.rpartition(".")
    return f"{names.get(part, part)}.{kind}"


def unet_name(key: str, layers: int, has_attention: list[bool]) -> str:
    """The name of a U-Net weight; has_attention: whether each up block attends to the text."""
    part, _, kind = key.rpartition(".")
    if part in UNET_ENDS:
        return f"{UNET_ENDS[part]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        name, i, rest = match[1], int(match[2]), match[3]
        return (
            f"middle_block.{2 * i}.{renamed(rest, RESNET)}" if name == "resnets" else f"middle_block.1.{rest}"
        )
    side, block, name, i, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key).groups()
    block, i = int(block), int(i)
    first = block * (layers + 1) + (1 if side == "down" else 0)
    place = f"{'input' if side == 'down' else 'output'}_blocks"
    if name == "resnets":
        return f"{place}.{first + i}.0.{renamed(rest, RESNET)}"
    if name == "attentions":
        return f"{place}.{first + i}.1.{rest}"
    if name == "downsamplers":
        return f"{place}.{first + layers}.0.op.{kind}"
    return f"{place}.{first + layers}.{2 if has_attention[block] else 1}.conv.{kind}"


def vae_name(key: str, blocks: int) -> str:
    """The name of a VAE weight; the decoder's blocks are counted the other way round."""
    key = key.replace("conv_norm_out", "norm_out")
    if match := re.fullmatch(r"(\w+)\.mid_block\.resnets\.(\d)\.(.+)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", key):
        return f"{match[1]}.mid.attn_1.{renamed(match[2], ATTENTION)}"
    if match := re.fullmatch(r"(\w+)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", key):
        coder, side, block, name, i, rest = match.groups()
        block = int(block) if side == "down" else blocks - 1 - int(block)
        inner = (
            f"block.{i}.{renamed(rest, {'conv_shortcut': 'nin_shortcut'})}"
            if name == "resnets"
            else f"{side}sample.{rest}"
        )
        return f"{coder}.{side}.{block}.{inner}"
    return key


def unet_and_vae(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """Those weights that have the same names in all versions; the VAE's attention is made of 1x1 convolutions
    there.
    """
    state = {}
    up_blocks = pipe.unet.config.up_block_types
    for key, value in pipe.unet.state_dict().items():
        name = unet_name(
            key, pipe.unet.config.layers_per_block, ["CrossAttn" in block for block in up_blocks]
        )
        state[f"model.diffusion_model.{name}"] = value
    for key, value in pipe.vae.state_dict().items():
        is_projection = ".attentions." in key and key.endswith("weight") and value.ndim == 2
        state[f"first_stage_model.{vae_name(key, 4)}"] = value[:, :, None, None] if is_projection else value
    return state


def original_checkpoint(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights in one dict, as in v1-5-pruned-emaonly."""
    state = unet_and_vae(pipe)
    for key, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.clone().contiguous() for key, value in state.items()}


OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    ".self_attn.": ".attn.",
}


def open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's weights as OpenCLIP names them, with queries, keys and values in one."""
    state = {}
    for key, value in weights.items():
        name = key.removeprefix("text_model.")
        for own, other in OPEN_CLIP.items():
            name = name.replace(own, other)
        if name == "text_projection.weight":
            state["text_projection"] = value.T
        elif ".q_proj." in name:
            parts = [weights[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            state[name] = value
    return state


def original_sdxl_checkpoint(pipe: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """All weights in one dict, as in sd_xl_base_1.0."""
    state = unet_and_vae(pipe)
    for key, value in pipe.text_encoder.state_dict().items():
        place = "conditioner.embedders.0.transformer.text_model"
        state[f"{place}.{key.removeprefix('text_model.')}"] = value
    second = open_clip(pipe.text_encoder_2.state_dict())
    state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    return {key: value.clone().contiguous() for key, value in state.items()}
