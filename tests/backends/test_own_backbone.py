"""A backbone from a user's own file, my_module:FAMILY: it samples like the others, if the user named it."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

import sample
from backends import check_backend, load_backend
from common.plugins import allow_code
from solvers import Predictor, SolverTable, Spec, UserError, save_predictor

FROM_SCRATCH = '''
import torch
from backends import Backend, Condition, Family


class Shrink(Backend):
    """x = sigma n for all prompts: the data are one point, 0."""

    latent_shape, sigma_min, sigma_max, default_schedule = (3, 4, 4), 0.1, 10.0, "logsnr"

    def __init__(self, config, device, dtype, name):
        self.name, self.device, self.dtype, self.grey = name, device, dtype, config.get("grey", 0.5)

    def encode(self, prompts, guidance_scale):
        return Condition({"text": torch.zeros(len(prompts), 1)}, None, guidance_scale)

    def velocity(self, condition):
        return lambda x, sigma: x / sigma.to(x).expand(len(x)).view(-1, 1, 1, 1)

    def decode(self, latents):
        return (latents + self.grey).clamp(0, 1)

    def identity(self):
        return "no weights"

    def image_options(self):
        return {"grey": self.grey}


FAMILY = Family("shrink", Shrink, Shrink, {"grey": (float, "of all pixels")})
NUMBER = 3
'''
FROM_A_PIPELINE = '''
from diffusers import StableDiffusionPipeline
from backends import Family
from backends.conditioning import apply_cfg, repeat_condition
from backends.diffusers_pipeline import COMMON_OPTIONS, PipelineBackend
from backends.loading import PipelineClass, load_pipeline


class FlowUNet(PipelineBackend):
    """A U-Net whose output is taken for a rectified flow's velocity."""

    NETWORK, IMAGE_OPTIONS, default_schedule, flow_shift = "unet", (), "flowmatch", 1.0
    latent_shape, sigma_min, sigma_max = (4, 8, 8), 1e-3, 1.0

    def embed(self, prompt):
        return {"text": self.pipe.encode_prompt(prompt, self.device, 1, False)[0]}

    def velocity(self, condition):
        batches = {}

        def velocity(x, sigma):
            inputs = x.repeat(2, 1, 1, 1) if condition.negative else x
            (times,) = self._timesteps(sigma, len(inputs))
            text = repeat_condition(condition, len(x), batches)["text"]
            return apply_cfg(self.network(inputs, times, encoder_hidden_states=text).sample, condition)

        return velocity


def load(config, device, dtype, name):
    pipe = load_pipeline(PipelineClass(StableDiffusionPipeline, "a folder"), config, dtype)
    return FlowUNet(pipe, device, config, name)


FAMILY = Family("flow-unet", FlowUNet, load, COMMON_OPTIONS)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module of the user's into the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # restored: loading appends the working directory

    def write(text: str) -> str:
        name = f"own_{abs(hash((text, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def run(*arguments):
    result = CliRunner().invoke(sample.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_module_is_a_backbone_of_the_command_line(tmp_path, own):
    name = f"{own(FROM_SCRATCH)}:FAMILY"
    options = ("--backend", name, "--backend-config", '{"grey": 0.25}', "--solver", "euler", "--num-steps", 4)
    run(
        *options, "--prompt", "a cat", "--seeds", "0-2", "--guidance", 1, "--outdir", "out", "--device", "cpu"
    )
    records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert len(records) == len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert {r["backbone"] for r in records} == {"shrink: no weights"}
    assert records[0]["config"] == {"grey": 0.25}
    with pytest.raises(UserError, match=r"backend_config\.gray: unknown option, expected one of grey"):
        check_backend(Spec(backend=name, backend_config={"gray": 0.5}))


def test_a_pipeline_backend_needs_embed_and_velocity_only(own, tiny_folder):
    name = f"{own(FROM_A_PIPELINE)}:FAMILY"
    allow_code(name)
    spec = Spec(backend=name, backend_config={"model_name_or_path": str(tiny_folder)}, num_steps=3)
    backend = load_backend(spec, "cpu")
    assert backend.flow
    assert list(backend.networks()) == ["unet", "text_encoder"]
    assert backend.sigmas(spec)[0] == 1
    x = backend.initial_latents([0, 1], 1.0)
    with torch.inference_mode():
        output = backend.velocity(backend.encode(["a cat", "the dog"], 3.0))(x, torch.tensor(0.5))
        assert output.shape == x.shape
        assert backend.decode(x).shape == (2, 3, 64, 64)


def test_a_predictor_cannot_have_its_backbone_loaded(tmp_path, own):
    """The file that a predictor names is loaded only where the user names it as well."""
    module = own(FROM_SCRATCH)
    spec = Spec(backend=f"{module}:FAMILY", num_steps=3, schedule_type="logsnr", guidance_rate=1.0)
    save_predictor(Predictor(SolverTable.uniform(2, 2), spec), tmp_path / "table.pkl")
    arguments = ("--predictor", "table.pkl", "--prompt", "x", "--seeds", 0, "--device", "cpu")
    with pytest.raises(UserError, match=f"would run code of {module}.py: name it yourself, as --backend"):
        run(*arguments)
    assert module not in sys.modules
    run(*arguments, "--backend", f"{module}:FAMILY")
    assert list((tmp_path / "samples" / "shrink").rglob("000000.png"))


@pytest.mark.parametrize(
    "attribute, words", [("MISSING", "cannot be loaded"), ("NUMBER", "is a int, expected a Family")]
)
def test_a_name_of_something_else_is_refused_in_one_line(own, attribute, words):
    name = f"{own(FROM_SCRATCH)}:{attribute}"
    allow_code(name)
    with pytest.raises(UserError, match=words) as caught:
        check_backend(Spec(backend=name))
    assert "\n" not in str(caught.value)
