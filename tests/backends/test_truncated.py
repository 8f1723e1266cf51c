"""Prompts that are longer than the text encoders read are noted once."""

import pytest
import torch
from tiny import CPU, load_tiny
from tiny_flow import save_flux, save_sd3

from backends import load_backend
from common.distributed import Ranks
from generation.generate import Sampler, generate
from generation.output import Output
from solvers import Euler, Spec, UserError

LONG = "dog " * 2000


def test_truncated_prompts_of_a_run_are_counted_once(tiny_folder, tmp_path, capsys):
    backend = load_tiny(tiny_folder)
    sampler = Sampler(backend, Euler(), "euler", torch.tensor([10.0, 1.0], dtype=torch.float64), 1.0)
    prompts, alone = ["a cat", LONG, "a dog", LONG + "a"], Ranks(0, 1, torch.device("cpu"))
    for count in (8, 8, 12):
        generate(sampler, prompts, list(range(count)), Output(tmp_path, batch=2), alone)
    notes = [line for line in capsys.readouterr().err.splitlines() if "prompts are longer" in line]
    assert len(notes) == 2  # nothing is made in the second run, hence nothing is noted
    assert notes[0].startswith("note: 2 of 4 prompts are longer than the text encoders read, and their ends")
    assert "the first is 'dog dog dog" in notes[0]


def test_a_prompt_that_just_fits_is_whole(tiny):
    fits = next(
        " ".join(["a"] * n)
        for n in range(100, 0, -1)
        if len(tiny.pipe.tokenizer(" ".join(["a"] * n)).input_ids) == 77
    )
    assert tiny.truncated([fits, fits + " a"]) == [fits + " a"]


@pytest.mark.parametrize(("save", "name"), [(save_sd3, "sd3"), (save_flux, "flux")])
def test_only_what_no_text_encoder_reads_is_truncated(tmp_path, save, name):
    """The T5 encoder reads more than CLIP's."""
    config = {"model_name_or_path": str(save(tmp_path / name)), "max_sequence_length": 200}
    backend = load_backend(Spec(backend=name, backend_config=config), CPU)
    prompts = ["a cat", " ".join(["a"] * 150), " ".join(["a"] * 300)]
    assert backend.truncated(prompts) == prompts[2:]


def test_seeds_beyond_32_bits_have_no_noise(tiny):
    with pytest.raises(UserError, match="seed 4294967296"):
        tiny.initial_latents([0, 2**32], 1.0)
