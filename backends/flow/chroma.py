"""Chroma: any diffusers folder or hub id of ChromaPipeline."""

from typing import Any

import torch
from torch import Tensor

from .. import quiet  # noqa: F401  isort: skip
from diffusers import ChromaPipeline  # isort: skip
from .adapter import FlowBackend, FlowCall, flow_family


class Chroma(FlowBackend):
    """FLUX.1-schnell's transformer without guidance distillation: packed latents, and a mask of the text."""

    CALL = FlowCall(
        ChromaPipeline,
        "a Chroma pipeline",
        tokens=512,
        positive={"encoder_hidden_states": 0, "attention_mask": 2},
        negative={"encoder_hidden_states": 3, "attention_mask": 5},
        packed=True,
    )
    default_guidance = 5.0

    def own_pixels(self) -> int:
        return self.pipe.default_sample_size * self.pipe.vae_scale_factor

    def conditioning(self, embeddings: dict[str, Tensor]) -> dict[str, Any]:
        mask = embeddings["attention_mask"]
        image = torch.ones(
            len(mask), self._patches[0] * self._patches[1], device=mask.device, dtype=mask.dtype
        )
        return super().conditioning(embeddings | {"attention_mask": torch.cat([mask, image], dim=1)})


FAMILY = flow_family(Chroma, "chroma")
