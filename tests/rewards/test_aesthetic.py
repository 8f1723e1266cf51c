"""The aesthetic predictor: equal to the head by hand on CLIP's own embedding."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from rewards import load_reward

WIDTHS = (32, 1024, 128, 64, 16, 1)


@pytest.fixture(scope="module")
def state():
    generator, tensors = torch.Generator().manual_seed(7), {}
    for position, inputs, outputs in zip((0, 2, 4, 6, 7), WIDTHS, WIDTHS[1:], strict=False):
        tensors[f"layers.{position}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        tensors[f"layers.{position}.bias"] = torch.randn(outputs, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(state, path)
    return path


def load(path, clip_folder):
    return load_reward("aesthetic", {"weights_path": str(path), "clip_path": str(clip_folder)}, "cpu")


def test_the_score_is_the_head_on_the_unit_embedding(state, weights, clip_folder, batch_free):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        x = model.get_image_features(pixel_values=(images - 0.5) / 0.5).pooler_output.double().numpy()
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    for position in (0, 2, 4, 6, 7):
        x = (
            x @ state[f"layers.{position}.weight"].double().numpy().T
            + state[f"layers.{position}.bias"].double().numpy()
        )
    reward = load(weights, clip_folder)
    scores = batch_free(reward, images, ["a", "b", "c"])
    np.testing.assert_allclose(scores.numpy(), x[:, 0], rtol=0, atol=1e-5)
    assert torch.equal(scores, reward(images, ["c", "", "a"]))  # whatever the prompt


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.7.bias": None}, "Missing key.*7.bias"),
        ({"layers.9.bias": torch.zeros(1)}, "Unexpected key.*9.bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, state, clip_folder, refused, change, message):
    torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / "head.pth")
    with refused(message):
        load(tmp_path / "head.pth", clip_folder)


def test_code_in_a_file_is_not_run(tmp_path, state, clip_folder, refused, planted):
    torch.save(state | {"more": planted[0]}, tmp_path / "head.pth")
    with refused("does not hold the weights"):
        load(tmp_path / "head.pth", clip_folder)
    assert not planted[1].exists()


def test_the_protocol_has_both_files(weights, clip_folder):
    protocol = load(weights, clip_folder).protocol()
    assert len(protocol["weights"]) == len(set(protocol["weights"])) == 2
