"""Rewards of the CLIP layout: equal to transformers' own score, independent of the batch, and right on real
digits.
"""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from digits import REWARD_FOLDER
from digits.data import DIGITS, Label, caption
from digits.drawings import held_out_drawings
from rewards import RewardError, load_reward
from rewards.clip_model import ClipReward

PROMPTS = ["a bold red handwritten seven", "thin blue number 3", "the digit zero in black, plain"]


@pytest.fixture(scope="module")
def reward():
    return load_reward("digits", {}, "cpu")


def drawings(step: int):
    images, labels = held_out_drawings()
    return images[::step], labels[::step]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_score_is_transformers_own(scaled):
    folder = str(REWARD_FOLDER)
    images = (torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    pictures = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    expected = logits if scaled else logits / model.logit_scale.exp()
    scores = ClipReward("x", folder, folder, torch.device("cpu"), scaled)(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_pickscore_is_transformers_own_logit(clip_folder):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(pixel_values=(images - 0.5) / 0.5, **tokens).logits_per_image.diagonal()
    folder = str(clip_folder)
    scores = load_reward("pickscore", {"weights_path": folder, "processor": str(REWARD_FOLDER)}, "cpu")(
        images, PROMPTS
    )
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    cosine = load_reward("clip", {"weights_path": folder}, "cpu")(images, PROMPTS)
    torch.testing.assert_close(cosine, expected / model.logit_scale.exp().detach(), rtol=1e-5, atol=1e-6)


def test_a_score_does_not_depend_on_its_batch(reward, batch_free):
    batch_free(reward, torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1)), PROMPTS * 3)


def test_larger_images_are_reduced_as_the_processor_does(reward):
    picture, _ = drawings(500)
    large = torch.nn.functional.interpolate(
        picture[:1], (96, 120), mode="bicubic", align_corners=False
    ).clamp(0, 1)
    array = (large[0].permute(1, 2, 0) * 255).round().byte().numpy()
    expected = CLIPImageProcessorPil.from_pretrained(REWARD_FOLDER)(
        Image.fromarray(array), return_tensors="pt"
    ).pixel_values
    pixels = reward.pixels(large)
    assert (pixels - expected).abs().mean() < 0.01
    assert pixels.shape == expected.shape


def test_it_reads_held_out_digits(reward):
    images, labels = drawings(60)
    scores = [
        reward(images, [caption(Label(d, c.colour, c.weight)) for c in labels]) for d in range(len(DIGITS))
    ]
    right = torch.stack(scores).argmax(0) == torch.tensor([c.digit for c in labels])
    assert right.double().mean() > 0.96


def test_the_judge_scores_what_a_prompt_names():
    judge = load_reward("judge", {}, "cpu")
    images, labels = drawings(100)
    right = judge(images, [caption(c) for c in labels])
    wrong = judge(images, [caption(Label((c.digit + 1) % 10, c.colour, c.weight)) for c in labels])
    assert (right > wrong).double().mean() > 0.97
    assert (right <= 0).all()
    with pytest.raises(RewardError, match="names no digit"):
        judge(images[:1], ["a cat"])


@pytest.mark.parametrize("damage", ["tokenizer", "weights", "cut", "size"])
def test_a_damaged_folder_is_refused_rather_than_scored_with(tmp_path, damage):
    folder = shutil.copytree(REWARD_FOLDER, tmp_path / "reward")
    weights, processor = folder / "model.safetensors", folder / "preprocessor_config.json"
    if damage == "tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif damage == "weights":
        save_file(
            {k: v for k, v in load_file(weights).items() if k != "visual_projection.weight"},
            weights,
            {"format": "pt"},
        )
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        processor.write_text(
            json.dumps(json.loads(processor.read_text()) | {"size": {"height": 32, "width": 32}})
        )
    with pytest.raises(RewardError, match="not a CLIP") as caught:
        load_reward("digits", {"weights_path": str(folder)}, "cpu")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_or_scored_is_one_line(tmp_path, reward):
    for name, config, message in [
        ("beauty", {}, "expected one of digits"),
        ("digits", {"path": "x"}, "unknown option 'path'"),
        ("digits", {"weights_path": str(tmp_path)}, "has no config.json"),
    ]:
        with pytest.raises(RewardError, match=message) as caught:
            load_reward(name, config, "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="2 prompts"):
        reward(torch.rand(3, 3, 32, 32), PROMPTS[:2])
