"""MPS: read safely from a whole pickled module, and equal to CLIP and the condition module by hand."""

import math
import posix
import sys
import types

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from rewards import load_reward
from rewards.safe_pickle import read_module_tensors

DIM, HEADS, WIDTH = 32, 16, 64
PROMPTS = ["a bold red handwritten seven", "thin blue number 3", "the digit zero in black, plain"]
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(8))
CONDITION = "digit colour, red"


def cross_state(seed):
    """Tensors of the condition module under the names of the published pickle."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    fused = HEADS * WIDTH + 2 * WIDTH + 2 * 4 * DIM
    for n in range(4):
        shapes = {"to_q": (HEADS * WIDTH, DIM), "to_kv": (2 * WIDTH, DIM), "to_out": (DIM, HEADS * WIDTH)}
        shapes |= {"ff.0": (8 * DIM, DIM), "ff.2": (DIM, 4 * DIM)}
        cross = {f"layers.{n}.0.fn.{k}.weight": s for k, s in shapes.items()}
        shapes = {
            "fused_attn_ff_proj": (fused, DIM),
            "attn_out": (DIM, HEADS * WIDTH),
            "ff_out.1": (DIM, 4 * DIM),
        }
        block = {f"layers.{n}.1.fn.{k}.weight": s for k, s in shapes.items()}
        for name, shape in (cross | block).items():
            tensors[name] = 1.5 * torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for part in (0, 1):
            tensors[f"layers.{n}.{part}.fn.norm.gamma"] = 1 + 0.2 * torch.randn(DIM, generator=generator)
            tensors[f"layers.{n}.{part}.fn.norm.beta"] = torch.zeros(DIM)
        tensors[f"layers.{n}.1.fn.rotary_emb.inv_freq"] = 10000 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    return tensors


def save_module(state, path, extra=None):
    """A torch file of a whole module of classes that exist only while it is written, with the tensors of
    `state`.
    """
    module = types.ModuleType("trainer.models.clip_model")
    module.CLIPModel = type("CLIPModel", (torch.nn.Module,), {"__module__": module.__name__})
    names = ("trainer", "trainer.models", module.__name__)
    sys.modules |= {
        names[0]: types.ModuleType(names[0]),
        names[1]: types.ModuleType(names[1]),
        names[2]: module,
    }
    try:
        root = module.CLIPModel()
        root.extra = extra
        for name, tensor in state.items():
            *parents, last = name.split(".")
            owner = root
            for parent in parents:
                if parent not in owner._modules:
                    owner.add_module(parent, module.CLIPModel())
                owner = owner._modules[parent]
            if name.endswith(("beta", "inv_freq", "position_ids")):
                owner.register_buffer(last, tensor)
            else:
                owner.register_parameter(last, torch.nn.Parameter(tensor))
        torch.save(root, path)
    finally:
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="module")
def state(clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in clip.items()}
    tensors |= {
        f"model.{kind}_model.embeddings.position_ids": torch.arange(5)[None] for kind in ("text", "vision")
    }
    return tensors | {f"cross_model.{name}": tensor for name, tensor in cross_state(1).items()}


@pytest.fixture
def load(tmp_path, state, clip_folder):
    def load(change=None, extra=None, **options):
        save_module(
            {k: v for k, v in (state | (change or {})).items() if v is not None}, tmp_path / "mps.pth", extra
        )
        config = {
            "weights_path": str(tmp_path / "mps.pth"),
            "processor": str(clip_folder),
            "condition": CONDITION,
        } | options
        return load_reward("mps", config, "cpu")

    return load


def silu_gated(x):
    first, gate = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return first * gate / (1 + (-gate).exp())


def attention(q, k, v, bias):
    """[n, HEADS * WIDTH] of queries, one head of keys and values [m, WIDTH], bias [m]."""
    parts = [((part @ k.T / 8) + bias).softmax(-1) @ v for part in q.split(WIDTH, 1)]
    return torch.cat(parts, 1)


def turned(x):
    """Rotary positions of [n, WIDTH] as a turn of complex numbers, of which the first half is real parts."""
    rates = 10000 ** -(torch.arange(0, WIDTH, 2).double() / WIDTH)
    turn = torch.polar(
        torch.ones(len(x), WIDTH // 2).double(), torch.arange(len(x)).double()[:, None] * rates
    )
    z = torch.complex(x[:, : WIDTH // 2], x[:, WIDTH // 2 :]) * turn
    return torch.cat([z.real, z.imag], 1)


def cross_by_hand(w, image, prompt, bias):
    """The condition module on image tokens [n, D] and prompt tokens [m, D] with an additive bias [m], in
    float64.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    for n in range(4):
        name = f"layers.{n}.0.fn."
        x = torch.nn.functional.layer_norm(image, (DIM,), w[name + "norm.gamma"], w[name + "norm.beta"])
        k, v = (prompt @ w[name + "to_kv.weight"].T).split(WIDTH, 1)
        read = attention(x @ w[name + "to_q.weight"].T, k, v, bias) @ w[name + "to_out.weight"].T
        image = image + read + silu_gated(x @ w[name + "ff.0.weight"].T) @ w[name + "ff.2.weight"].T
        name = f"layers.{n}.1.fn."
        x = torch.nn.functional.layer_norm(image, (DIM,), w[name + "norm.gamma"], w[name + "norm.beta"])
        q, k, v, ff = (x @ w[name + "fused_attn_ff_proj.weight"].T).split(
            [HEADS * WIDTH, WIDTH, WIDTH, 8 * DIM], 1
        )
        q = torch.cat([turned(part) for part in q.split(WIDTH, 1)], 1)
        looked = attention(q, turned(k), v, torch.zeros(len(x)).double()) @ w[name + "attn_out.weight"].T
        image = image + looked + silu_gated(ff) @ w[name + "ff_out.1.weight"].T
    return image


def by_hand(clip_folder, image, prompt, threshold):
    """The score of one image [3, 32, 32], and how many of its prompt's 16 tokens are read."""
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)

    def tokens(text):
        ids = tokenizer(text, padding="max_length", max_length=16, return_tensors="pt").input_ids
        hidden = clip.text_model(input_ids=ids).last_hidden_state[0] @ clip.text_projection.weight.T
        return hidden, hidden[ids[0].tolist().index(tokenizer.eos_token_id)]

    words, whole = tokens(prompt)
    condition, _ = tokens(CONDITION)
    best = [max(float(word @ other) for other in condition) for word in words]
    bias = torch.tensor([0.0 if b / max(best) > threshold else -math.inf for b in best]).double()
    hidden = clip.vision_model.embeddings((image.double()[None] - 0.5) / 0.5)
    hidden = clip.vision_model.pre_layrnorm(hidden)
    for layer in clip.vision_model.encoder.layers:
        hidden = layer(hidden, None)
    read = cross_by_hand(cross_state(1), hidden[0] @ clip.visual_projection.weight.T, words, bias)[0]
    cosine = read @ whole / read.norm() / whole.norm()
    return (clip.logit_scale.exp() * cosine).item(), int((bias == 0).sum())


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_the_score_is_the_paper_by_hand(load, clip_folder, batch_free, threshold):
    with torch.no_grad():
        expected, kept = zip(
            *(
                by_hand(clip_folder, image, prompt, threshold)
                for image, prompt in zip(IMAGES, PROMPTS, strict=True)
            ),
            strict=True,
        )
    reward = load(threshold=threshold)
    scores = batch_free(reward, IMAGES, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert tuple(int(reward.text(prompt).kept.sum()) for prompt in PROMPTS) == kept
    if threshold == 0.8:
        assert all(0 < k < 16 for k in kept)  # some tokens are left out


def test_what_is_kept_of_a_prompt_is_relative_to_its_own_best_token(load):
    reward = load(threshold=0.8)
    with torch.inference_mode():
        assert [bool(reward.text(prompt).kept.any()) for prompt in PROMPTS] == [True] * 3
    assert reward.protocol()["options"] == {"condition": CONDITION, "threshold": 0.8}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cross_model.layers.3.0.fn.to_q.weight": None}, "Missing key.*cross_model.layers.3.0.to_q.weight"),
        ({"model.logit_scale": None}, "Missing key.*model.logit_scale"),
        ({"more.weight": torch.zeros(1)}, "Unexpected key.*more.weight"),
    ],
)
def test_a_pickle_that_does_not_fit_is_refused(load, refused, change, message):
    with refused(message):
        load(change)


def test_code_in_a_pickle_is_not_run(load, planted):
    assert load(extra=planted[0])(IMAGES, PROMPTS).isfinite().all()
    assert not planted[1].exists()


def test_a_pickle_that_asks_the_system_is_refused(load, refused, planted):
    trap, mark = planted
    trap.call = posix.system, (f"touch {mark}",)
    with refused("does not hold the weights it needs"):
        load(extra=trap)
    assert not mark.exists()


def test_a_file_without_a_module_is_refused(tmp_path, refused, clip_folder):
    path = tmp_path / "x.pth"
    for content in ({"a": torch.zeros(1)}, [1]):
        torch.save(content, path)
        with pytest.raises(ValueError, match="expected a whole module"):
            read_module_tensors(path)
        with refused("expected a whole module"):
            load_reward("mps", {"weights_path": str(path), "processor": str(clip_folder)}, "cpu")
    path.write_bytes(b"no torch file")
    with refused("does not hold the weights it needs"):
        load_reward("mps", {"weights_path": str(path), "processor": str(clip_folder)}, "cpu")


def test_the_tensors_of_a_module_are_read_by_name(tmp_path, state):
    save_module(state, tmp_path / "m.pth")
    tensors = read_module_tensors(tmp_path / "m.pth")
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert "trainer" not in sys.modules
