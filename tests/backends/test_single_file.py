"""Single files in the original Stable Diffusion layout load as the folder they were made of."""

import pytest
import torch
from compvis import original_checkpoint
from safetensors.torch import save_file
from tiny import PROMPTS, load_tiny, states

from backends import BackendError

KNOWN = {  # names in v1-5-pruned-emaonly.safetensors
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.time_embed.2.bias",
    "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.middle_block.2.out_layers.3.weight",
    "model.diffusion_model.output_blocks.0.0.skip_connection.weight",
    "model.diffusion_model.out.2.weight",
    "first_stage_model.encoder.down.0.downsample.conv.weight",
    "first_stage_model.decoder.mid.attn_1.proj_out.weight",
    "first_stage_model.decoder.up.3.block.0.norm1.weight",
    "first_stage_model.post_quant_conv.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
}


@pytest.fixture(scope="module")
def checkpoint(tiny):
    return original_checkpoint(tiny.pipe)


@pytest.fixture(scope="module", params=["model.safetensors", "model.ckpt"])
def file(request, checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / request.param
    if path.suffix == ".ckpt":
        torch.save({"state_dict": checkpoint, "global_step": 1}, path)
    else:
        save_file(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def configuration(tiny_folder, tmp_path_factory):
    """The folder without its weights, so that they can only come from the file."""
    folder = tmp_path_factory.mktemp("configuration")
    for path in tiny_folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = folder / path.relative_to(tiny_folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder


def test_the_layout_is_the_original(checkpoint, tiny):
    assert set(checkpoint) >= KNOWN
    assert checkpoint["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    modules = (tiny.pipe.unet, tiny.pipe.vae, tiny.pipe.text_encoder)
    assert len(checkpoint) == sum(len(m.state_dict()) for m in modules)


def test_the_weights_are_those_of_the_folder(file, configuration, tiny):
    single = load_tiny(file, config=str(configuration))
    for name in ("unet", "vae", "text_encoder"):
        expected, loaded = (
            parts[name].state_dict() for parts in (tiny.pipe.components, single.pipe.components)
        )
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(loaded[k], expected[k]) for k in expected), name


def test_velocity_and_images_are_those_of_the_folder(file, configuration, tiny):
    single, x, sigma = (
        load_tiny(file, config=str(configuration)),
        states(3),
        torch.tensor(2.5, dtype=torch.float64),
    )
    with torch.no_grad():
        velocity, expected = (b.velocity(b.encode(PROMPTS, 7.5))(x, sigma) for b in (single, tiny))
        assert torch.equal(velocity, expected)
        assert torch.equal(single.decode(x), tiny.decode(x))
    assert single.identity() == str(file)


def test_other_weights_give_another_velocity(checkpoint, configuration, tiny, tmp_path):
    """The file is what is read: with one weight changed, the velocity changes."""
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    save_file(checkpoint | {key: 3 * checkpoint[key]}, tmp_path / "other.safetensors")
    single, x, sigma = (
        load_tiny(tmp_path / "other.safetensors", config=str(configuration)),
        states(3),
        torch.tensor(2.5),
    )
    with torch.no_grad():
        velocity, expected = (b.velocity(b.encode(PROMPTS, 1))(x, sigma) for b in (single, tiny))
    assert (velocity - expected).abs().max() > 1e-4


def test_dtype(file, configuration):
    single = load_tiny(file, "bfloat16", config=str(configuration))
    assert {p.dtype for p in single.pipe.unet.parameters()} == {torch.bfloat16}
    assert single.dtype == torch.bfloat16


def test_without_a_configuration_and_a_hub(file):
    with pytest.raises(BackendError, match=r"configuration.*backend_config\.config") as caught:
        load_tiny(file)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_text_encoder(checkpoint, configuration, tmp_path):
    partial = {k: v for k, v in checkpoint.items() if not k.startswith("cond_stage_model")}
    save_file(partial, tmp_path / "partial.safetensors")
    with pytest.raises(BackendError, match="could not be loaded") as caught:
        load_tiny(tmp_path / "partial.safetensors", config=str(configuration))
    assert "\n" not in str(caught.value)
