"""From a pipeline folder to a table in that pipeline, by the commands that the pages show."""

import json
import re
import shutil
import sys
from functools import partial

import pytest
import torch

from backends import find_family
from backends.model_ids import PIPELINES
from common.errors import UserError
from solvers import load_predictor
from training.distill.config import DistillConfig
from training.distill.own_model import OwnModel, configuration, main
from training.run_folder import RunFolder

from ...commands import ROOT, command_lines, command_of, run_of
from ..runs import error_of, invoke, overrides

sys.path.insert(0, str(ROOT / "tests" / "backends"))
from tiny_others import save_other
from tiny_sdxl import save_sdxl

FOLDERS = {"ldm": "sd", "sd3": "sd3", "flux": "flux"}
PLACEHOLDER = "exps/PLACEHOLDER"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A copy of the folder of each family's digits."""
    root = tmp_path_factory.mktemp("models")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / "digits" / folder, root / folder)
    return {family: str(root / folder) for family, folder in FOLDERS.items()}


def three_commands(page: str) -> tuple:
    """The two commands of a page, as modules with arguments, and the Python that follows them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = dict.fromkeys(line for line in command_lines(text) if "/path/to/finetune" in line)
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if '"my-scheduler"' in b)
    distill, export = (run_of(line) for line in lines)
    return distill, export, code


@pytest.fixture(scope="module")
def distilled(models, tmp_path_factory):
    """The run of the first command of the README, with few pairs and steps, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    distill, _, _ = three_commands("README.md")
    few = overrides(
        f"bank.folder={folder / 'banks'}", "teacher.inner=15", "teacher.check=0", "train.lr=0.1",
        "train.batch=16", "train.chunk=16", "evaluation.baselines=[euler]",
        "evaluation.schedules=[time_uniform]",
    )  # fmt: skip
    small = ["--pairs", 16, "--train-steps", 12, "--prompts", "digits", "--guidance", 1, "--device", "cpu"]
    arguments = [models["ldm"] if a == "/path/to/finetune" else a for a in distill.arguments]
    out = invoke(command_of(distill.module), *arguments, *small, *few, "--exps", folder / "exps")
    return RunFolder(next((folder / "exps").glob("*-my"))), out


@pytest.mark.parametrize("page", ["README.md", "docs/diffusers.md"])
def test_the_three_commands_of_a_page(page, models, distilled, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    from integrations.diffusers.epd_scheduler import EPDScheduler

    run, _ = distilled
    first, export, code = three_commands(page)
    assert first == three_commands("README.md")[0]
    monkeypatch.chdir(tmp_path)
    places = {"/path/to/finetune": models["ldm"], PLACEHOLDER: str(run.path)}
    invoke(command_of(export.module), *(places.get(a, a) for a in export.arguments))
    pipe = StableDiffusionPipeline.from_pretrained(models["ldm"], dtype=torch.float32)
    exec(compile(code, page, "exec"), {"pipe": pipe, "EPDScheduler": EPDScheduler})
    assert (tmp_path / "a.png").stat().st_size > 500
    assert pipe.scheduler.config.made_for["8"]["guidance"] == 1


def test_the_table_is_better_than_its_start(distilled):
    run, out = distilled
    heldout = [r["heldout"] for r in run.records() if "heldout" in r]
    assert min(heldout[1:]) < heldout[0]
    lines = out.splitlines()
    assert "family ldm at 32 pixels, guidance 1" in lines[1]
    assert "8 network calls one after another, NFE 8 an image" in lines[2]
    assert lines[3].startswith("network rows: ")
    assert lines[4].startswith("estimate of time: ")


def test_a_run_goes_on_only_with_its_own_model_and_settings(models, distilled, tmp_path):
    run, _ = distilled
    resume = ("my", "--resume", run.path, "--model")
    assert "leave out --steps" in error_of(main, *resume, models["ldm"], "--steps", "6")
    assert "but the run to go on with has" in error_of(main, *resume, models["sd3"])
    best = (run.export / "network-snapshot-export-best.pkl").read_bytes()
    invoke(main, *resume, models["ldm"], "--device", "cpu")
    assert (run.export / "network-snapshot-export-best.pkl").read_bytes() == best


@pytest.mark.parametrize(
    "family, guidance, schedule",
    [("ldm", 7.5, "discrete"), ("sd3", 4.5, "flowmatch"), ("flux", 3.5, "flowmatch")],
)
def test_family_guidance_and_schedule_are_the_models(models, family, guidance, schedule):
    config = configuration(OwnModel(models[family], 8))
    assert isinstance(config, DistillConfig)
    assert (config.backend.name, config.guidance_scale, config.nodes.schedule) == (family, guidance, schedule)
    assert config.backend.config == {"model_name_or_path": models[family], "resolution": 32}
    assert (config.student.kind, config.student.depth, config.student.num_points) == ("tableau", 8, 1)
    assert (config.bank.pairs, config.bank.prompts, config.train.steps) == (128, None, 100)
    out = invoke(main, "my", "--model", models[family], "--steps", 8, "--student", "epd", "--dry-run")
    assert "8 network calls one after another, 5 nodes, NFE 12 an image; num_inference_steps=12" in out
    assert "network rows: " in out


@pytest.mark.parametrize(
    "family", [name for name in dict.fromkeys(PIPELINES.values()) if name not in FOLDERS]
)
def test_a_family_without_digits_has_a_configuration(family, tmp_path):
    """That of a family like it, for the class that the folder names."""
    name = next(k for k, v in PIPELINES.items() if v == family)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    config = configuration(OwnModel(str(tmp_path), 8))
    assert config.backend.name == family
    flow = find_family(family).flow
    assert (config.nodes.schedule, config.teacher.schedule) == (
        ("flowmatch", "flowmatch") if flow else ("discrete", "polynomial")
    )
    assert config.backend.dtype == ("bfloat16" if flow else "float16")


@pytest.mark.parametrize("family", ["sdxl", "sana"])
def test_from_a_folder_of_another_family_to_a_table(family, tmp_path):
    save = save_sdxl if family == "sdxl" else partial(save_other, family)
    model = save(tmp_path)
    few = overrides(
        f"bank.folder={tmp_path / 'banks'}", "teacher.inner=3", "teacher.check=0", "backend.dtype=float32",
        "evaluation.baselines=[euler]", "evaluation.schedules=[polynomial]",
    )  # fmt: skip
    small = ("--steps", 3, "--pairs", 4, "--train-steps", 2, "--device", "cpu", "--exps", tmp_path / "exps")
    invoke(main, "my", "--model", model, *small, *few)
    (best,) = (tmp_path / "exps").glob("*-my/export/*-best.pkl")
    assert (load_predictor(best).spec.backend, load_predictor(best).cost().depth) == (family, 3)


@pytest.mark.parametrize(
    "backend, pixels, memory", [("ldm", 512, "12 GB"), ("sd3", 1024, "GB"), ("flux", 1024, "GB")]
)
def test_a_single_file_has_the_settings_of_the_published_model(backend, pixels, memory):
    own = ("my", "--model", "finetune.safetensors", "--steps", 8, "--backend", backend)
    out = invoke(main, *own, "--student", "epd", "--resolution", pixels, "--dry-run")
    assert re.search(r"estimate of memory at 16 bits: \d+ GB", out)
    assert "  checkpointing: true\n" in out


@pytest.mark.parametrize(
    "more, message",
    [
        ((), "--steps is not given"),
        (("--steps", "7", "--student", "epd"), "--steps 7: an EPD step takes two network calls"),
        (("--steps", "8", "--backend", "sd3"), "model_index.json is of family ldm"),
        (("--steps", "8", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("--steps", "8", "--override", "train.stepz=3"), "train.stepz"),
    ],
)
def test_mistakes_get_one_line(models, more, message):
    assert message in error_of(main, "my", "--model", models["ldm"], *more)


@pytest.mark.parametrize(
    "index, message",
    [
        (
            {"_class_name": "PixArtSigmaPipeline"},
            "is not supported, expected one of Stable",
        ),
        ({}, "expected JSON with _class_name"),
        (None, "name it with --backend ldm|sdxl|sd3|flux|"),
    ],
)
def test_a_folder_of_another_kind_gets_one_line(tmp_path, index, message):
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        configuration(OwnModel(str(tmp_path), 8))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
