"""Options as the published code takes them: what is passed on, what is refused by name, what is kept out of
every file.
"""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from tiny import load_tiny, save_tiny
from tiny_flow import save_sd3

import sample
import sample_sd3
from backends import BackendError, check_backend, load_backend
from common import prompts as prompt_files
from generation import request
from generation.request import PromptOptions
from solvers import Predictor, SolverTable, Spec, UserError, flowmatch, save_predictor


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def passed_on(monkeypatch):
    """What from_pretrained was given by the last call."""
    seen = {}
    for cls in (StableDiffusionPipeline, StableDiffusion3Pipeline):
        whole = cls.from_pretrained

        def spy(path, *, whole=whole, **options):
            seen.clear()
            seen.update(options)
            return whole(path, **{k: v for k, v in options.items() if k != "token"})

        monkeypatch.setattr(cls, "from_pretrained", spy)
    return seen


def test_options_reach_the_library(tmp_path, passed_on):
    folder = save_tiny(tmp_path)
    load_tiny(folder, token="hf_1", use_safetensors=True, pipeline_kwargs={"low_cpu_mem_usage": False})
    assert passed_on["token"] == "hf_1"
    assert passed_on["use_safetensors"] is True
    assert passed_on["low_cpu_mem_usage"] is False
    load_tiny(folder)
    assert {"token", "use_safetensors", "low_cpu_mem_usage"}.isdisjoint(passed_on)


@pytest.mark.parametrize("name", ["custom_pipeline", "custom_revision", "trust_remote_code"])
def test_what_would_run_foreign_code_is_refused_by_name(name):
    spec = Spec(backend="sd3", backend_config={"pipeline_kwargs": {name: "someone/code"}})
    with pytest.raises(BackendError, match=rf"backend_config\.pipeline_kwargs\.{name}: it would run code"):
        check_backend(spec)


def test_an_option_has_one_place(tmp_path):
    spec = Spec(backend="ldm", backend_config={"pipeline_kwargs": {"revision": "main"}})
    with pytest.raises(BackendError, match=r"give it as an option of its own, backend_config\.revision"):
        check_backend(spec)


def test_a_token_of_the_wrong_type_is_not_shown():
    with pytest.raises(BackendError) as caught:
        check_backend(Spec(backend="sd3", backend_config={"token": 12345}))
    assert "12345" not in str(caught.value)


def test_stable_diffusion_3_without_t5(sd3, passed_on):
    config = {"model_name_or_path": str(sd3), "max_sequence_length": 16}
    without = load_backend(Spec(backend="sd3", backend_config=config | {"text_encoder_3": False}), "cpu")
    assert without.pipe.text_encoder_3 is None
    assert (passed_on["text_encoder_3"], passed_on["tokenizer_3"]) == (None, None)
    assert without.image_options()["text_encoder_3"] is False
    whole = load_backend(Spec(backend="sd3", backend_config=config | {"text_encoder_3": True}), "cpu")
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = (
        backend.velocity(backend.encode(["a cat"], 1.0))(x, torch.tensor(0.5)) for backend in (without, whole)
    )
    assert a.isfinite().all()
    assert not torch.equal(a, b)


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def sd3_table(folder: Path, **changes) -> Path:
    spec = Spec(
        backend="sd3",
        backend_config={"max_sequence_length": 16},
        num_steps=4,
        schedule_type="flowmatch",
        guidance_rate=1.0,
        **changes,
    )
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, flowmatch(4, shift=3.0)), folder / "table.pkl")
    return folder / "table.pkl"


def test_model_id_and_token_on_the_command_line(tmp_path, sd3, passed_on):
    config = json.dumps(
        {"model_id": str(sd3), "token": "hf_1", "use_safetensors": True, "latent_resolution": 8}
    )
    common = [
        "--predictor",
        sd3_table(tmp_path),
        "--prompt",
        "a cat",
        "--seeds",
        "0",
        "--outdir",
        tmp_path / "out",
    ]
    output = run(sample_sd3.main, *common, "--backend-config", config)
    assert passed_on["token"] == "hf_1"
    assert "hf_1" not in output
    assert not any(b"hf_1" in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_a_schedule_option_that_contradicts_the_table_names_both(tmp_path, sd3):
    path = sd3_table(tmp_path, flowmatch_shift=3.0)
    with pytest.raises(UserError, match=r"flowmatch_shift is 2.0, but .*table.pkl was made for 3.0"):
        run(
            sample.main,
            "--predictor",
            path,
            "--model-path",
            sd3,
            "--prompt",
            "x",
            "--backend-config",
            '{"flowmatch_shift": 2.0}',
        )


def test_the_coco_captions_are_used_where_they_are(tmp_path, monkeypatch):
    captions = tmp_path / "MS-COCO_val2014_30k_captions.csv"
    monkeypatch.setattr(prompt_files, "COCO", captions)
    monkeypatch.setattr(request, "COCO", captions)
    spec = Spec(dataset_name="ms_coco", backend="ldm")
    assert prompt_files.default_prompts("ms_coco") == prompt_files.TRAIN
    with pytest.raises(UserError, match="no prompts"):
        PromptOptions(None, None).read(spec)
    captions.write_text("id,text\n1,a dog\n2,a cat\n")
    assert prompt_files.default_prompts("ms_coco") == captions
    assert prompt_files.default_prompts("other") == prompt_files.TRAIN
    assert PromptOptions(None, None).read(spec) == ["a dog", "a cat"]
    assert PromptOptions(None, None, allow_empty=True).read(spec) == [""]
