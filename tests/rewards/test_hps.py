"""HPSv2: equal to open_clip's own encoders behind hpsv2's own preparation, and loaded strictly."""

import json

import pytest
import torch

from rewards import check_reward, load_reward
from rewards.pixels import CLIP_MEAN, CLIP_STD

open_clip = pytest.importorskip("open_clip")
transforms = pytest.importorskip("torchvision.transforms")

PROMPTS = ["a café — “quoted” &amp; strange", "a cat", "two dogs on a sofa, oil painting"]
LAYOUT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of HPSv2's layout with random weights; its name is tiny-hps."""
    path = tmp_path_factory.mktemp("layout") / "tiny-hps.json"
    path.write_text(json.dumps(LAYOUT))
    open_clip.add_model_config(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.create_model("tiny-hps", pretrained=None, output_dict=False).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hps") / "weights.pt"
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    return path


def load(path, **options):
    return load_reward("hps", {"weights_path": str(path), "model_name": "tiny-hps"} | options, "cpu")


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (45, 51)])
def test_the_score_is_open_clips_own_cosine(model, weights, size):
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1))
    steps = [
        transforms.Resize(32, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(32),
    ]
    pixels = transforms.Compose([*steps, transforms.Normalize(CLIP_MEAN, CLIP_STD)])(images)
    with torch.no_grad():
        seen = model.encode_image(pixels, normalize=True)
        read = model.encode_text(open_clip.get_tokenizer("tiny-hps")(PROMPTS), normalize=True)
    torch.testing.assert_close(load(weights)(images, PROMPTS), (seen * read).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_score_does_not_depend_on_its_batch(weights, batch_free):
    batch_free(load(weights), torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(2)), PROMPTS)


def test_prompts_are_encoded_once(weights):
    reward, images = load(weights), torch.rand(3, 3, 32, 32)
    reward(images, PROMPTS)
    kept = reward.text.cache_info().misses
    reward(images, PROMPTS[::-1])
    assert kept == reward.text.cache_info().misses == 3


def test_the_protocol_names_the_version_and_the_way_of_computing(weights):
    old, new = (load(weights, version=version).protocol() for version in ("v2.0", "v2.1"))
    assert (old["version"], new["version"]) == ("v2.0", "v2.1")
    assert old["weights"] == new["weights"]
    assert new["options"] == {"model_name": "tiny-hps", "amp": False}
    assert load(weights, amp=True).protocol()["options"]["amp"] is False  # there is no CUDA here to run it on


def test_loading_leaves_the_random_numbers_alone(weights):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load(weights)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("damage", ["lacking", "extra", "shape", "bare", "cut", "list"])
def test_a_file_that_does_not_fit_is_refused(tmp_path, model, refused, damage):
    state, path = dict(model.state_dict()), tmp_path / "w.pt"
    messages = {
        "lacking": "Missing key.*visual.proj",
        "extra": "Unexpected key.*more",
        "shape": "size mismatch for visual.proj",
    }
    if damage == "lacking":
        del state["visual.proj"]
    elif damage == "extra":
        state["more"] = torch.zeros(1)
    elif damage == "shape":
        state["visual.proj"] = torch.zeros(3, 3)
    torch.save(state if damage == "bare" else [state] if damage == "list" else {"state_dict": state}, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    with refused(
        messages.get(damage, "no 'state_dict'" if damage == "bare" else "does not hold the weights")
    ):
        load(path)


def test_code_in_a_file_is_not_run(tmp_path, refused, planted):
    torch.save({"state_dict": {}, "more": planted[0]}, tmp_path / "w.pt")
    with refused("does not hold the weights"):
        load(tmp_path / "w.pt")
    assert not planted[1].exists()


def test_versions_are_named_and_not_mixed(tmp_path, weights, refused):
    with refused("unknown version 'v3', expected one of v2.0, v2.1"):
        load(weights, version="v3")
    other = tmp_path / "HPS_v2_compressed.pt"
    other.write_bytes(weights.read_bytes())
    for use in (load, lambda path: check_reward("hps", {"weights_path": str(path)})):
        with refused("holds v2.0, but version is 'v2.1'"):
            use(other)
    assert load(other, version="v2.0").version == "v2.0"
    with refused("unknown model_name 'ViT-Z'"):
        load(weights, model_name="ViT-Z")


def tower(prefix, layers, width, hidden):
    """Names and shapes of the blocks of one tower, as HPSv2's file has them."""
    for n in range(layers):
        block = f"{prefix}transformer.resblocks.{n}."
        for norm in ("ln_1", "ln_2"):
            yield from ((f"{block}{norm}.weight", (width,)), (f"{block}{norm}.bias", (width,)))
        yield from (
            (f"{block}attn.in_proj_weight", (3 * width, width)),
            (f"{block}attn.in_proj_bias", (3 * width,)),
        )
        yield from (
            (f"{block}attn.out_proj.weight", (width, width)),
            (f"{block}attn.out_proj.bias", (width,)),
        )
        yield from ((f"{block}mlp.c_fc.weight", (hidden, width)), (f"{block}mlp.c_fc.bias", (hidden,)))
        yield from ((f"{block}mlp.c_proj.weight", (width, hidden)), (f"{block}mlp.c_proj.bias", (width,)))


@pytest.mark.slow
def test_the_published_layout_fits_strictly(tmp_path):
    shapes = dict(tower("visual.", 32, 1280, 5120)) | dict(tower("", 24, 1024, 4096))
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= dict.fromkeys((f"{name}.weight", f"{name}.bias"), (1024 if name == "ln_final" else 1280,))
    shapes |= {
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
    }
    shapes |= {
        "visual.conv1.weight": (1280, 3, 14, 14),
        "token_embedding.weight": (49408, 1024),
        "logit_scale": (),
    }
    shapes |= {"positional_embedding": (77, 1024), "text_projection": (1024, 1024)}
    assert len(shapes) == 686
    path = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save(
        {"state_dict": {name: torch.tensor(0.01).expand(shape) for name, shape in shapes.items()}}, path
    )  # one number a tensor
    reward = load_reward("hps", {"weights_path": str(path)}, "cpu")
    assert round(sum(p.numel() for p in reward.model.parameters()) / 1e6, 1) == 986.1
    assert reward.pixels.side == 224
