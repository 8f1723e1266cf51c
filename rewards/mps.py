"""MPS (Zhang et al. 2024, arXiv 2405.14705): CLIP ViT-H/14 with cross-attention of the image to the words of
the prompt that a condition selects.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from .base import Reward, RewardError
from .clip_model import CLIP_H, load_processor
from .cross_attention import CrossModel, renamed
from .files import build_with_weights, check_folder, find_file, unusable_model, wrap_errors, wrong_weights
from .pixels import Pixels
from .safe_pickle import read_module_tensors

FILE = "MPS_overall_checkpoint.pth"
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure,"
    " instance, texture, quantity, attributes, position, number, location, word, things."
)


class PromptEmbedding(NamedTuple):
    """Embeddings of a prompt's tokens [77, D] and of the whole [D], and which tokens the condition keeps
    [77].
    """

    tokens: Tensor
    whole: Tensor
    kept: Tensor


class MPSNet(nn.Module):
    """CLIP and the condition module on its tokens."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.model = CLIPModel(config)
        self.cross_model = CrossModel(config.projection_dim)


class MPSReward(Reward):
    """The overall score of MPS (Zhang et al. 2024, arXiv 2405.14705): logit scale times cosine of the prompt
    and the image conditioned on it.

    A prompt token is attended to where its best inner product with a token of `condition`, over the prompt's
    largest, is above `threshold`. `weights_path` is the published pickle, of which only tensors are read;
    `processor` has the CLIP configuration and tokenizer: a folder or a name on the hub.
    """

    name = "mps"
    version = "overall"
    pixels: Pixels

    def __init__(
        self,
        device: torch.device | str,
        weights_path: str | None = None,
        processor: str = CLIP_H,
        condition: str = OVERALL,
        threshold: float = 0.3,
    ):
        check_threshold(threshold)
        path = find_file(self.name, weights_path, FILE, None)
        self.device, self.threshold = torch.device(device), threshold
        self.tokenizer, self.pixels = load_processor(self.name, processor)
        with wrap_errors(self.name, unusable_model(processor, "a CLIP configuration")):
            config = CLIPConfig.from_pretrained(processor)
        self.net = build_with_weights(
            self.name, path, lambda: MPSNet(config), read_state(self.name, path)
        ).to(self.device)
        self.files, self.options = [path], {"condition": condition, "threshold": threshold}
        with torch.inference_mode():
            self.condition = self.encode(condition)[0]
        self.text = lru_cache(maxsize=256)(self.embed_prompt)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        check_threshold(options["threshold"])
        find_file(cls.name, options["weights_path"], FILE, None)
        return check_folder(cls.name, options["processor"], "preprocessor_config.json")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = self.net.model
        with torch.no_grad():
            texts = [self.text(prompt) for prompt in prompts]
        tokens, whole, kept = (torch.stack(part) for part in zip(*texts, strict=True))
        image = clip.visual_projection(clip.vision_model(pixel_values=self.pixels(images)).last_hidden_state)
        conditioned = self.net.cross_model(image, tokens, kept)[:, 0]
        return clip.logit_scale.exp() * F.cosine_similarity(conditioned, whole, dim=-1)

    def embed_prompt(self, prompt: str) -> PromptEmbedding:
        """A prompt by itself, so that which of its tokens are kept does not depend on its batch."""
        tokens, whole = self.encode(prompt)
        best = (tokens @ self.condition.T).amax(-1)
        return PromptEmbedding(tokens, whole, best / best.max() > self.threshold)

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a text's tokens, padding and all [77, D], and of its end [D]."""
        clip = self.net.model
        longest = clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            text, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).input_ids
        output = clip.text_model(input_ids=tokens.to(self.device))
        whole = clip.text_projection(output.pooler_output[0])
        return clip.text_projection(output.last_hidden_state[0]), whole


def read_state(reward: str, path: Path) -> dict[str, Tensor]:
    """The tensors of the published pickle under the names of MPSNet; another file: RewardError."""
    with wrap_errors(reward, wrong_weights(path)):
        state = renamed(read_module_tensors(path))
    return {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}


def check_threshold(value: float) -> None:
    """A threshold that could leave nothing of a prompt: RewardError."""
    if not 0 <= value < 1:
        raise RewardError(f"reward 'mps': threshold is {value}, expected 0 <= threshold < 1")
