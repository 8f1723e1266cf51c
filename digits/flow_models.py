"""The parts of the digits twins of Stable Diffusion 3 and FLUX.1, in their exact diffusers layouts,
all tiny.
"""

import json
import re
from collections.abc import Iterable
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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .models import MAX_TOKENS, make_text_encoder

# where Stable Diffusion 3 has T5's tokens, of which the twin has none: zeros, as in the real one without T5
SD3_EXTRA_TOKENS = 4
CLIP_WIDTH, T5_WIDTH = 32, 64


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A CLIP text transformer with projection, 2 layers of width 32."""
    words = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 2 * CLIP_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        projection_dim=CLIP_WIDTH,
        **sizes,
        **words,
    )
    return CLIPTextModelWithProjection(config)


def make_t5_tokenizer(captions: Iterable[str], folder: Path) -> T5TokenizerFast:
    """A T5 tokenizer that knows the words of the captions, and all else letter by letter."""
    words = sorted({w for c in captions for w in re.findall(r"\w+", c.lower())})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(c), -8.0) for c in range(33, 127)] + [(f"▁{w}", -3.0) for w in words]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {**special, "extra_ids": 0, "model_max_length": MAX_TOKENS, "tokenizer_class": "T5Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return T5TokenizerFast.from_pretrained(folder)


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 encoder, 2 layers of width 64."""
    sizes = {"d_model": T5_WIDTH, "d_kv": 16, "d_ff": 2 * T5_WIDTH, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes)
    )


def shifted_vae(vae: AutoencoderKL) -> AutoencoderKL:
    """The digits VAE with the shift that these families' pipelines ask for."""
    vae.register_to_config(shift_factor=0.0)
    return vae


class SD3Denoiser(torch.nn.Module):
    """The transformer and both text encoders of the twin of Stable Diffusion 3, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = make_clip(tokenizer), make_clip(tokenizer)
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=2 * CLIP_WIDTH,
            caption_projection_dim=64,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=8,
        )

    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What StableDiffusion3Pipeline.encode_prompt makes of tokens [B, L] without a third encoder."""
        outputs = [
            encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        extra = text.new_zeros(len(text), SD3_EXTRA_TOKENS, text.shape[-1])
        return torch.cat([text, extra], 1), torch.cat([output[0] for output in outputs], -1)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, tokens: dict[str, torch.Tensor], guidance=None
    ) -> torch.Tensor:
        """The velocity at states [B, 4, 8, 8] and times [B] in [0, 1]."""
        text, pooled = self.embed(tokens["clip"])
        return self.transformer(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def pipeline(
        self, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5TokenizerFast
    ) -> StableDiffusion3Pipeline:
        """The pipeline of these parts; the two text encoders share a tokenizer."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=shifted_vae(vae),
            text_encoder=self.text_encoder,
            tokenizer=clip,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=clip,
            text_encoder_3=None,
            tokenizer_3=None,
        )


class FluxDenoiser(torch.nn.Module):
    """The transformer and both text encoders of the twin of FLUX.1, trained together; the guidance scale is
    an input.
    """

    def __init__(self, clip: CLIPTokenizer, t5: T5TokenizerFast):
        super().__init__()
        self.text_encoder, self.text_encoder_2 = make_text_encoder(clip), make_t5(t5)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=64,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, tokens: dict[str, torch.Tensor], guidance: torch.Tensor
    ) -> torch.Tensor:
        """The velocity at states [B, 4, 8, 8], times [B] in [0, 1] and guidance scales [B]."""
        n = len(x)
        text = self.text_encoder_2(tokens["t5"])[0]
        output = self.transformer(
            hidden_states=FluxPipeline._pack_latents(x, n, 4, 8, 8),
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=self.text_encoder(tokens["clip"]).pooler_output,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(output, 32, 32, 4)

    def pipeline(self, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5TokenizerFast) -> FluxPipeline:
        """The pipeline of these parts, with FLUX.1-dev's scheduler."""
        shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifts),
            vae=shifted_vae(vae),
            text_encoder=self.text_encoder,
            tokenizer=clip,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=t5,
            transformer=self.transformer,
        )
