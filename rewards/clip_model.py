"""Rewards of the CLIP layout in transformers: CLIP's own, PickScore's, and the embedded one for digits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from digits import REWARD_FOLDER

from .base import CosineReward
from .files import check_folder, unusable_model, weight_files, wrap_errors
from .pixels import Pixels

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"


class ClipReward(CosineReward):
    """Cosine of a CLIP model's image and text embeddings (Radford et al. 2021, arXiv 2103.00020).

    Args:
        name: of the reward.
        folder: the model: a folder or a name on the hub.
        processor: its tokenizer and image sizes: a folder or a name on the hub.
        device: where the model is.
        scaled: times its logit scale.

    Raises:
        RewardError: one of the two cannot be loaded.
    """

    version = "1"

    def __init__(self, name: str, folder: str, processor: str, device: torch.device | str, scaled: bool):
        self.name, self.scaled = name, scaled
        with wrap_errors(name, unusable_model(folder, "a CLIP model")):
            model, info = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            lacking = [*info["missing_keys"], *info["mismatched_keys"]]
            if lacking:
                raise ValueError(f"its weights lack {len(lacking)} tensors, such as {lacking[0]}")
        self.tokenizer, pixels = load_processor(name, processor)
        super().__init__(device, pixels)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.files = weight_files(folder)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, prompt: str) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.device)
        return self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = super().score(images, prompts)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine


class ClipScore(ClipReward):
    """The cosine of CLIP ViT-L/14 (Radford et al. 2021, arXiv 2103.00020)."""

    name = "clip"
    version = "ViT-L/14"

    def __init__(self, device: torch.device | str, weights_path: str = CLIP_L):
        super().__init__(self.name, weights_path, weights_path, device, scaled=False)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        return check_folder(cls.name, options["weights_path"])


class DigitsReward(ClipScore):
    """The cosine of the embedded image-text model of digits; weights_path: a folder to load instead."""

    name = "digits"
    version = "1"

    def __init__(self, device: torch.device | str, weights_path: str = str(REWARD_FOLDER)):
        super().__init__(device, weights_path)


class PickScore(ClipReward):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): logit scale times cosine of a tuned CLIP
    ViT-H/14.
    """

    version = "v1"

    def __init__(self, device: torch.device | str, weights_path: str = PICKSCORE, processor: str = CLIP_H):
        super().__init__("pickscore", weights_path, processor, device, scaled=True)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        model = check_folder("pickscore", options["weights_path"])
        return model + check_folder("pickscore", options["processor"], "preprocessor_config.json")


def load_processor(reward: str, where: str) -> tuple[Any, Pixels]:
    """The tokenizer and the image preparation of a CLIP model in a folder or on the hub, else RewardError."""
    with wrap_errors(reward, unusable_model(where, "a CLIP processor")):
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        if len(tokenizer) < 512:  # each byte, inside and at the end of a word
            raise ValueError(f"a tokenizer of {len(tokenizer)} words, whose files are missing")
        # PIL's by name, for its sizes: which one AutoImageProcessor takes depends on what is installed
        processor = CLIPImageProcessorPil.from_pretrained(where)
        if "shortest_edge" not in processor.size:
            raise ValueError(f"its processor has size {dict(processor.size)}, expected shortest_edge")
    return tokenizer, Pixels(
        processor.size["shortest_edge"], tuple(processor.image_mean), tuple(processor.image_std)
    )
