"""What is done to images first: equal to the usual libraries' own."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from rewards.pixels import CLIP_MEAN, CLIP_STD, Pixels

SIZES = [(512, 512), (768, 512), (257, 331), (150, 200), (224, 224), (225, 224)]


def pictures(size):
    """Smooth images [2, 3, H, W] with whole 8-bit values, some of them at the ends of the range."""
    coarse = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(size[0]))
    fine = torch.nn.functional.interpolate(
        coarse * 1.6 - 0.3, size, mode="bicubic", align_corners=False
    ).clamp(0, 1)
    return (fine * 255).round() / 255


@pytest.mark.parametrize("size", [*SIZES, (224, 227)])
def test_without_clamping_it_is_what_hpsv2_does(size):
    transforms = pytest.importorskip("torchvision.transforms")
    steps = [
        transforms.Resize(224, transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(224),
    ]
    expected = transforms.Compose([*steps, transforms.Normalize(CLIP_MEAN, CLIP_STD)])(pictures(size))
    torch.testing.assert_close(Pixels(clamp=False)(pictures(size)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_with_clamping_it_is_what_clip_does_but_for_rounding_to_8_bits(size):
    images = pictures(size)
    files = [Image.fromarray((i.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for i in images]
    processor = CLIPImageProcessorPil(
        image_mean=CLIP_MEAN, image_std=CLIP_STD, size={"shortest_edge": 224}, crop_size=224
    )
    expected = processor(files, return_tensors="pt").pixel_values
    prepared = Pixels()(images)
    assert (prepared - expected).abs().max() < 1.6 / 255 / min(CLIP_STD)
    assert (prepared - expected).abs().mean() < 0.5 / 255 / min(CLIP_STD)


def test_an_overshoot_is_clamped_only_where_it_is_asked():
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    assert Pixels(48, (0, 0, 0), (1, 1, 1), clamp=False)(edge).max() > 1.001
    assert Pixels(48, (0, 0, 0), (1, 1, 1), clamp=True)(edge).max() == 1


def test_it_says_what_it_does():
    assert "clamped" in str(Pixels())
    assert "clamped" not in str(Pixels(clamp=False))
    assert str(Pixels(side=32)) != str(Pixels(side=224))
