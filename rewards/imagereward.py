"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder with cross-attention to the image, and
a linear head on its first token.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .base import Reward, RewardError
from .files import build_with_weights, check_folder, find_file, read_checkpoint, unusable_model, wrap_errors
from .linear_head import linear_head
from .pixels import Pixels

FILE, REPOSITORY = "ImageReward.pt", "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the training scores
OFFSETS = {"none": 0.0, "published": 3 * STD}
VISION: dict[str, Any] = {  # ViT-L/16
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {  # BERT base, each layer also attends to the image
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "is_decoder": True,
}
# from the names of the published file to transformers'; the text encoder's and the head's are the same
RULES = (
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^vision\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^vision\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
)
UNUSED = re.compile(
    r"^blip\.(vision_proj|text_proj|itm_head|temp|\w*queue\w*|\w+_m)(\.|$)|^text\.embeddings\.position_ids$"
)


class ImageRewardNet(nn.Module):
    """Images [B, 3, side, side], tokens and their mask [B, 35] to raw scores [B] (arXiv 2304.05977, section
    3).
    """

    def __init__(self):
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**VISION))
        self.text = BlipTextModel(
            BlipTextConfig(**TEXT, encoder_hidden_size=VISION["hidden_size"]), add_pooling_layer=False
        )
        self.mlp = linear_head(TEXT["hidden_size"])

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return self.mlp(text[:, 0])[:, 0]


class ImageReward(Reward):
    """The standard score of ImageReward (Xu et al. 2023, arXiv 2304.05977): (f - mean) / std of its training
    scores.

    `tokenizer` is BERT's: a folder or a name on the hub. `offset: published` adds 3 std, as the published
    RDPO rewards do.
    """

    name = "imagereward"
    version = "v1.0"
    pixels: Pixels

    def __init__(
        self,
        device: torch.device | str,
        weights_path: str | None = None,
        tokenizer: str = TOKENIZER,
        offset: str = "none",
    ):
        self.shift = offset_of(offset)
        path = find_file(self.name, weights_path, FILE, REPOSITORY)
        self.tokenizer = load_tokenizer(tokenizer)
        self.device, self.pixels = torch.device(device), Pixels(VISION["image_size"])
        self.net = build_with_weights(
            self.name, path, ImageRewardNet, renamed(read_checkpoint(self.name, path))
        ).to(self.device)
        self.files, self.options = [path], {"offset": offset}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        offset_of(options["offset"])
        find_file(cls.name, options["weights_path"], FILE, REPOSITORY)
        return check_folder(cls.name, options["tokenizer"], "tokenizer_config.json")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        raw = self.net(self.pixels(images), texts.input_ids, texts.attention_mask)
        return (raw - MEAN) / STD + self.shift


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the published file under transformers' names, without those that no score needs."""
    tensors = {}
    for name, tensor in state.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        if not UNUSED.match(name):
            tensors[name] = tensor
    return tensors


def offset_of(choice: str) -> float:
    """What is added to a score; an unknown choice: RewardError."""
    if choice not in OFFSETS:
        raise RewardError(
            f"reward 'imagereward': unknown offset {choice!r}, expected one of {', '.join(OFFSETS)}"
        )
    return OFFSETS[choice]


def load_tokenizer(where: str) -> BertTokenizer:
    """BERT's tokenizer from a folder or the hub; none there: RewardError."""
    with wrap_errors("imagereward", unusable_model(where, "a BERT tokenizer")):
        tokenizer = BertTokenizer.from_pretrained(where)
        if len(tokenizer) < 100:
            raise ValueError(f"a tokenizer of {len(tokenizer)} words, whose files are missing")
        return tokenizer
