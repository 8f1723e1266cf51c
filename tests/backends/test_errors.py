"""What is missing, broken or contradictory: one line that says so, at once."""

import os
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tiny import CPU, load_tiny

from backends import BackendError, load_backend
from solvers import Spec, UserError


def refusal(load) -> str:
    """The line of the BackendError that load() raises without waiting for a network."""
    start = time.monotonic()
    with pytest.raises(BackendError) as caught:
        load()
    assert time.monotonic() - start < 20
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


@pytest.fixture
def broken(tiny_folder, tmp_path):
    """A copy of the folder to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_backend_error_is_a_user_error():
    assert issubclass(BackendError, UserError)


@pytest.mark.parametrize(
    "model",
    ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "no-such.safetensors", "a/b/c.ckpt", "a/b/c"],
)
def test_missing_paths(model):
    assert f"model '{model}' not found" in refusal(lambda: load_tiny(model))


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "model_index.json" in refusal(lambda: load_tiny(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_index(broken, content):
    (broken / "model_index.json").write_text(content)
    assert "could not be loaded" in refusal(lambda: load_tiny(broken))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "gone"])
def test_broken_weights(broken, part, damage):
    (file,) = (broken / part).glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[: len(content) // 2], "zeros": bytes(1000), "empty": b"", "gone": b""}[damage]
    )
    if damage == "gone":
        file.unlink()
    line = refusal(lambda: load_tiny(broken))
    assert line.startswith(
        f"model '{broken}' could not be loaded: expected a Stable Diffusion 1.x/2.x pipeline"
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_missing_part(broken, part):
    shutil.rmtree(broken / part)
    assert "could not be loaded" in refusal(lambda: load_tiny(broken))


@pytest.mark.parametrize("files", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_missing_tokenizer(broken, files):
    """The library makes one that knows no word: each prompt would be the empty one."""
    path = broken / files
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert "tokenizer of 2 words" in refusal(lambda: load_tiny(broken))


def test_weights_of_another_shape(broken):
    config = broken / "unet" / "config.json"
    text = config.read_text()
    assert '"cross_attention_dim": 32' in text
    config.write_text(text.replace('"cross_attention_dim": 32', '"cross_attention_dim": 48'))
    assert "expected shape" in refusal(lambda: load_tiny(broken))


@pytest.mark.parametrize(
    ("part", "option", "value", "words"),
    [
        ("unet", "in_channels", 9, "latent channels 9 of the U-Net but 4"),  # inpainting
        ("unet", "cross_attention_dim", 48, "text width 48 of the U-Net but 32"),  # Stable Diffusion XL
    ],
)
def test_parts_that_do_not_belong_together(tiny, tmp_path, part, option, value, words):
    pipe = tiny.pipe
    other = type(pipe.unet).from_config(pipe.unet.config, **{option: value})
    parts = pipe.components | {part: other}
    type(pipe)(**parts, requires_safety_checker=False).save_pretrained(tmp_path)
    assert words in refusal(lambda: load_tiny(tmp_path))


@pytest.mark.parametrize("name", ["text.safetensors", "text.ckpt", "notes.txt", "image.png"])
def test_files_of_a_wrong_kind(tmp_path, tiny_folder, name):
    (tmp_path / name).write_bytes(b"\x89PNG or some text " * 20)
    for options in ({}, {"config": str(tiny_folder)}):
        assert "could not be loaded" in refusal(lambda options=options: load_tiny(tmp_path / name, **options))


def test_files_of_other_weights(tmp_path, tiny_folder):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "a.ckpt")
    torch.save([1, 2], tmp_path / "b.ckpt")
    for name in ("a.safetensors", "a.ckpt", "b.ckpt"):
        assert "could not be loaded" in refusal(
            lambda name=name: load_tiny(tmp_path / name, config=str(tiny_folder))
        )


class Trap:
    """What would make a folder if it were unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_cannot_run_code(tmp_path, tiny_folder):
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, tmp_path / "trap.ckpt")
    assert "could not be loaded" in refusal(
        lambda: load_tiny(tmp_path / "trap.ckpt", config=str(tiny_folder))
    )
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("pixels", [60, 0, -8, "64", 64.0])
def test_resolutions_that_do_not_fit(tiny_folder, pixels):
    message = refusal(lambda: load_tiny(tiny_folder, resolution=pixels))
    assert (
        f"resolution {pixels}: expected a positive multiple of 8" in message
        or f"resolution is {pixels!r}, expected int" in message
    )


def test_offloading_needs_an_accelerator(tiny_folder):
    line = refusal(lambda: load_tiny(tiny_folder, enable_model_cpu_offload=True))
    assert "enable_model_cpu_offload" in line
    assert "cpu" in line


def test_dtypes(tiny_folder):
    assert "dtype 'float128': expected auto, float32" in refusal(lambda: load_tiny(tiny_folder, "float128"))
    assert "dtype 'int8': expected auto, float32" in refusal(
        lambda: load_tiny(tiny_folder, torch_dtype="int8")
    )


def test_unknown_options(tiny_folder):
    line = refusal(lambda: load_tiny(tiny_folder, resolutoin=64))
    assert line.startswith("backend_config.resolutoin: unknown option, expected one of model_name_or_path")


def test_options_that_are_none_count_as_absent(tiny_folder, digits):
    config = {"resolution": None, "negative_prompt": None, "revision": None, "torch_dtype": None}
    assert load_tiny(tiny_folder, **config).encode(["a cat"], 2.0).negative["text"].shape == (1, 77, 32)
    embedded = load_backend(Spec(backend="digits", backend_config={"model_name_or_path": None}), CPU)
    assert (
        embedded.pipe.unet.config.block_out_channels == digits.pipe.unet.config.block_out_channels == [32, 64]
    )


@pytest.mark.parametrize("model", ["some-organisation/some-model", "gpt2"])
def test_hub_ids_without_a_hub(tmp_path, monkeypatch, model):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refusal(lambda: load_tiny(model, pipeline_kwargs={"cache_dir": str(tmp_path)}))
    remedies = (
        f"model '{model}' is neither a folder here",
        "HF_HUB_OFFLINE is set",
        f"'hf download {model}'",
        "--model_path",
    )
    assert all(words in line for words in remedies)
