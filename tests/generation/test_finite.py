"""Numbers that are not finite never become images."""

import torch
from click.testing import CliRunner

from backends import load_backend
from common.distributed import Ranks
from common.errors import UserError
from generation.generate import Sampler, generate
from generation.output import Output
from sample import main
from solvers import Euler, Spec, polynomial

PROMPTS = ["a handwritten three", "a handwritten seven"]


def error_of(function) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_a_guidance_that_overflows(tmp_path):
    arguments = ["--solver", "euler", "--num-steps", "3", "--guidance", "1e39", "--seeds", "5,6"]
    result = CliRunner().invoke(main, [*arguments, "--outdir", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("seed 5, prompt ")
    assert "its latents are not finite numbers, nor are those of 1 others" in str(result.exception)
    assert not list(tmp_path.rglob("*.png"))


def test_a_network_or_decoder_with_a_broken_weight(tmp_path):
    for part, name, what in (
        ("unet", "conv_out.weight", "latents"),
        ("vae", "decoder.conv_out.weight", "decoded images"),
    ):
        backend = load_backend(Spec(backend="digits"), "cpu")
        weight = backend.pipe.components[part].get_parameter(name)
        weight.data.view(-1)[0] = float("nan")
        sampler = Sampler(backend, Euler(), "euler", polynomial(3, 0.1, 10.0), 1.0)
        output, alone = Output(tmp_path / part), Ranks(0, 1, torch.device("cpu"))
        message = error_of(lambda s=sampler, o=output, r=alone: generate(s, PROMPTS, [0, 1], o, r))
        assert message.startswith(f"seed 0, prompt 'a handwritten three': its {what} are not finite numbers")
        assert not list((tmp_path / part).rglob("*.png"))
