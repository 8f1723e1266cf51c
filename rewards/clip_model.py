"""Rewards of the CLIP layout in transformers: PickScore's, and the embedded one for digits."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from .base import Reward, RewardError


class ClipReward(Reward):
    """Cosine of a CLIP model's image and text embeddings (Radford et al. 2021).

    Times its logit scale if `scaled`: PickScore (Kirstain et al. 2023, arXiv 2305.01569).
    """

    def __init__(self, name: str, folder: str, processor: str, device: torch.device, scaled: bool):
        self.name, self.device, self.scaled = name, torch.device(device), scaled
        try:
            model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            self.processor = CLIPImageProcessorPil.from_pretrained(processor)
            lacking = [*info["missing_keys"], *info["mismatched_keys"]]
            if lacking:
                raise ValueError(f"its weights lack {len(lacking)} tensors, such as {lacking[0]}")
            if len(self.tokenizer) < 512:  # each byte, inside and at the end of a word
                raise ValueError(f"a tokenizer of {len(self.tokenizer)} words, whose files are missing")
            if "shortest_edge" not in self.processor.size:
                raise ValueError(f"its processor has size {dict(self.processor.size)}, expected shortest_edge")
        except Exception as error:  # what the libraries raise for a broken file has no common type
            raise RewardError(missing(name, folder, error)) from error
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.mean, self.std = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.processor.image_mean, self.processor.image_std)
        )
        self._texts: dict[str, Tensor] = {}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = (self.resized(images) - self.mean) / self.std
        found = F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        cosine = (found * torch.cat([self.text(p) for p in prompts])).sum(-1)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine

    def resized(self, images: Tensor) -> Tensor:
        """The shorter side to the processor's size, bicubic with antialiasing, and the centre cut out."""
        side = self.processor.size["shortest_edge"]
        height, width = images.shape[-2:]
        if min(height, width) != side:
            scale = side / min(height, width)
            size = round(height * scale), round(width * scale)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        return images[..., top : top + side, left : left + side]

    def text(self, prompt: str) -> Tensor:
        """The unit text embedding [1, D] of a prompt, by itself so that it does not depend on its batch; kept."""
        if prompt not in self._texts:
            longest = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=longest, return_tensors="pt").to(self.device)
            features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            if len(self._texts) >= 4096:
                self._texts.pop(next(iter(self._texts)))
            self._texts[prompt] = F.normalize(features, dim=-1)
        return self._texts[prompt]


def missing(name: str, folder: str, error: Exception) -> str:
    """One line that says what could not be loaded and what provides it."""
    reason = " ".join(str(error).split())[:160]
    remedy = "name another folder" if Path(folder).exists() else f"run 'hf download {folder}', or name a local folder"
    return f"reward {name!r}: {folder!r} is not a CLIP model that can be loaded; {remedy} ({type(error).__name__}: {reason})"
