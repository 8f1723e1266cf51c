"""ImageReward: equal to BLIP by hand on the names of the published file, and loaded strictly from them."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertTokenizer

from rewards import imagereward, load_reward

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 160,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LONGEST = 64
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "dog",
    "on",
    "red",
    "sofa",
    *(f"word{i}" for i in range(120)),
]
PROMPTS = ["a cat", "a red dog on a sofa", "sofa"]
HEAD = (1024, 128, 64, 16, 1)
FULL = dict(imagereward.VISION), dict(imagereward.TEXT)


def shapes(vision, text):
    """Names and shapes of the published file."""
    d, h, t, m = (
        vision["hidden_size"],
        vision["intermediate_size"],
        text["hidden_size"],
        text["intermediate_size"],
    )
    patch, positions = vision["patch_size"], (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    v, b = "blip.visual_encoder.", "blip.text_encoder."
    shapes_of = {
        v + "cls_token": (1, 1, d),
        v + "pos_embed": (1, positions, d),
        v + "patch_embed.proj.weight": (d, 3, patch, patch),
    }
    shapes_of |= {v + "patch_embed.proj.bias": (d,), v + "norm.weight": (d,), v + "norm.bias": (d,)}

    def linear(name, outputs, inputs):
        return {name + ".weight": (outputs, inputs), name + ".bias": (outputs,)}

    def norm(name, width):
        return {name + ".weight": (width,), name + ".bias": (width,)}

    for n in range(vision["num_hidden_layers"]):
        block = f"{v}blocks.{n}."
        shapes_of |= (
            norm(block + "norm1", d) | norm(block + "norm2", d) | linear(block + "attn.qkv", 3 * d, d)
        )
        shapes_of |= (
            linear(block + "attn.proj", d, d)
            | linear(block + "mlp.fc1", h, d)
            | linear(block + "mlp.fc2", d, h)
        )
    shapes_of |= {b + "embeddings.word_embeddings.weight": (text["vocab_size"], t)}
    shapes_of |= {b + "embeddings.position_embeddings.weight": (text["max_position_embeddings"], t)} | norm(
        b + "embeddings.LayerNorm", t
    )
    for n in range(text["num_hidden_layers"]):
        layer = f"{b}encoder.layer.{n}."
        for kind, width in (("attention", t), ("crossattention", d)):
            shapes_of |= linear(f"{layer}{kind}.self.query", t, t) | linear(
                f"{layer}{kind}.self.key", t, width
            )
            shapes_of |= linear(f"{layer}{kind}.self.value", t, width) | linear(
                f"{layer}{kind}.output.dense", t, t
            )
            shapes_of |= norm(f"{layer}{kind}.output.LayerNorm", t)
        shapes_of |= (
            linear(layer + "intermediate.dense", m, t)
            | linear(layer + "output.dense", t, m)
            | norm(layer + "output.LayerNorm", t)
        )
    for position, inputs, outputs in zip((0, 2, 4, 6, 7), (t, *HEAD), HEAD, strict=False):
        shapes_of |= linear(f"mlp.layers.{position}", outputs, inputs)
    return shapes_of


UNUSED = {  # the published file has these too
    "blip.text_encoder.embeddings.position_ids": torch.arange(LONGEST)[None],
    "blip.vision_proj.weight": torch.zeros(8, 32),
    "blip.text_proj.bias": torch.zeros(8),
    "blip.visual_encoder_m.norm.weight": torch.zeros(32),
    "blip.image_queue": torch.zeros(8, 4),
    "blip.itm_head.weight": torch.zeros(2, 24),
}


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(VISION, TEXT | {"max_position_embeddings": LONGEST}).items():
        scale = 2 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3
        tensors[name] = scale * torch.randn(shape, generator=generator) + (
            "orm" in name and name.endswith("weight")
        )
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors["blip.visual_encoder." + name] *= 2e-3  # so small that the first norm's epsilon matters
    return tensors


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for key, value in VISION.items():
            patch.setitem(imagereward.VISION, key, value)
        for key, value in (TEXT | {"max_position_embeddings": LONGEST}).items():
            patch.setitem(imagereward.TEXT, key, value)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(tmp_path, state, tokenizer):
    def load(change, **options):
        torch.save({k: v for k, v in (state | UNUSED | change).items() if v is not None}, tmp_path / "ir.pt")
        return load_reward(
            "imagereward", {"weights_path": str(tmp_path / "ir.pt"), "tokenizer": tokenizer} | options, "cpu"
        )

    return load


def by_hand(state, pixels, prompt):
    """The raw score of one prepared image [3, 32, 32], in float64: ViT (pre-norm), BERT with cross-attention
    (post-norm), head.
    """
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def attention(q, k, v, heads):
        parts = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            parts.append((a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c)
        return torch.cat(parts, -1)

    v, b = "blip.visual_encoder.", "blip.text_encoder."
    patches = F.unfold(pixels.double()[None], 8, stride=8)[0].T
    x = patches @ w[v + "patch_embed.proj.weight"].flatten(1).T + w[v + "patch_embed.proj.bias"]
    x = torch.cat([w[v + "cls_token"][0], x]) + w[v + "pos_embed"][0]
    for n in range(2):
        block = f"{v}blocks.{n}."
        q, k, value = linear(block + "attn.qkv", norm(block + "norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(block + "attn.proj", attention(q, k, value, 4))
        x = x + linear(block + "mlp.fc2", F.gelu(linear(block + "mlp.fc1", norm(block + "norm2", x, 1e-6))))
    image = norm(v + "norm", x, 1e-6)

    ids = [
        WORDS.index("[CLS]"),
        *map(WORDS.index, prompt.split()),
        WORDS.index("[SEP]"),
    ]  # without the padding, which is not attended to
    y = (
        w[b + "embeddings.word_embeddings.weight"][ids]
        + w[b + "embeddings.position_embeddings.weight"][: len(ids)]
    )
    y = norm(b + "embeddings.LayerNorm", y, 1e-12)
    for n in range(2):
        layer = f"{b}encoder.layer.{n}."
        for kind in ("attention", "crossattention"):
            seen = y if kind == "attention" else image
            name = f"{layer}{kind}."
            parts = (
                linear(name + "self.query", y),
                linear(name + "self.key", seen),
                linear(name + "self.value", seen),
            )
            y = norm(
                name + "output.LayerNorm", y + linear(name + "output.dense", attention(*parts, 2)), 1e-12
            )
        wide = F.gelu(linear(layer + "intermediate.dense", y))
        y = norm(layer + "output.LayerNorm", y + linear(layer + "output.dense", wide), 1e-12)
    score = y[0]
    for position in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{position}", score)
    return score.item()


def test_the_score_is_blip_by_hand(load, state, batch_free):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(c).view(3, 1, 1)
        for c in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    raw = [
        by_hand(state, (image - mean) / std, prompt) for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    expected = torch.tensor([(r - 0.16717362830052426) / 1.0333394966054072 for r in raw])
    scores = batch_free(load({}), images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        load({}, offset="published")(images, PROMPTS), expected + 3.1000185, rtol=1e-4, atol=1e-4
    )


def test_the_offset_is_part_of_the_protocol(load):
    assert load({}).protocol()["options"] == {"offset": "none"}
    assert load({}, offset="published").protocol()["options"] == {"offset": "published"}


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"blip.visual_encoder.blocks.1.attn.qkv.bias": None},
            "Missing key.*vision.encoder.layers.1.self_attn.qkv.bias",
        ),
        (
            {"blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": None},
            "Missing key.*crossattention.self.key",
        ),
        ({"blip.text_decoder.weight": torch.zeros(1)}, "Unexpected key.*blip.text_decoder.weight"),
        ({"mlp.layers.7.weight": torch.zeros(2, 16)}, "size mismatch for mlp.7.weight"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(load, refused, change, message):
    with refused(message):
        load(change)


def test_a_missing_tokenizer_is_refused(load, refused, tmp_path):
    with refused("has no tokenizer_config.json"):
        load({}, tokenizer=str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with refused("not a BERT tokenizer that can be loaded; run 'hf download"):
        load({}, tokenizer=str(tmp_path))


def test_the_published_layout_fits_strictly(tmp_path, tokenizer):
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "image_size": 224,
        "patch_size": 16,
    }
    text = {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "max_position_embeddings": 512,
    }
    names = shapes(vision, text)
    names |= {"blip.vision_proj.weight": (256, 1024), "blip.vision_proj.bias": (256,)}
    names |= {"blip.text_proj.weight": (256, 768), "blip.text_proj.bias": (256,)}
    assert round(sum(map(math.prod, names.values())) / 1e6, 1) == 446.7
    torch.save(
        {name: torch.tensor(0.01).expand(shape) for name, shape in names.items()}, tmp_path / "ir.pt"
    )  # one number a tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagereward, "VISION", FULL[0])
        patch.setattr(imagereward, "TEXT", FULL[1])
        reward = load_reward(
            "imagereward", {"weights_path": str(tmp_path / "ir.pt"), "tokenizer": tokenizer}, "cpu"
        )
    assert sum(1 for _ in reward.net.parameters()) == len(names) - 4
    assert reward.pixels.side == 224
