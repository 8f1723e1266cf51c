"""python -m solvers.predictor to-diffusers: folders that diffusers loads, and their model card."""

import ast
import json
import sys

import pytest
import torch
from cases import Case, sd_parts
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from reference import random_table, table_file
from scheduler_cases import noise_nodes

from integrations.diffusers import EPDScheduler
from solvers import load_predictor
from solvers.predictor.__main__ import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(**sd_parts(folder)).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def tables(model):
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    return [
        str(random_table("tableau1", noise_nodes(config), model.parent, "ldm")),
        str(table_file("epd-g7.5-d4")),
    ]


def run(*arguments, **options):
    return CliRunner().invoke(main, ["to-diffusers", *map(str, arguments)], **options)


@pytest.fixture(scope="module")
def folders(model, tables):
    """A scheduler folder and a pipeline folder."""
    for name, flags in (("scheduler-only", []), ("whole", ["--pipeline"])):
        done = run(*tables, "--model", model, model.parent / name, *flags)
        assert done.exit_code == 0, done.output
        assert "num_inference_steps 3, 6" in done.output
    return model.parent / "scheduler-only", model.parent / "whole"


def latents(pipe, steps):
    case = Case(pipe, (4, 8, 8), {"prompt": "a cat"})
    return case.latents(pipe.scheduler, steps, case.noise())


@pytest.fixture(scope="module")
def expected(model, tables):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.scheduler = EPDScheduler.from_predictor(*tables, config=pipe.scheduler.config)
    return {steps: latents(pipe, steps) for steps in (3, 6)}


def test_a_scheduler_folder_loads_and_gives_the_same_latents(folders, model, expected):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.scheduler = EPDScheduler.from_pretrained(folders[0])
    for steps, wanted in expected.items():
        assert torch.equal(latents(pipe, steps), wanted)


def test_a_pipeline_folder_needs_trust_and_then_gives_the_same_latents(folders, expected):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folders[1])
    pipe = DiffusionPipeline.from_pretrained(folders[1], trust_remote_code=True)
    assert isinstance(pipe, StableDiffusionPipeline)
    for steps, wanted in expected.items():
        assert torch.equal(latents(pipe, steps), wanted)


def test_the_file_beside_the_json_needs_torch_and_diffusers_alone(folders):
    """At the level of the module; from_predictor imports the project, where it is used."""
    tree = ast.parse((folders[0] / "epd_scheduler.py").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in imports
    }
    assert {"torch", "diffusers"} <= names
    assert names <= {"torch", "diffusers", *sys.stdlib_module_names}
    assert all(node.level == 0 for node in imports if isinstance(node, ast.ImportFrom))


def test_the_card_says_what_the_tables_were_made_for(folders):
    for folder in folders:
        card = (folder / "README.md").read_text()
        error = load_predictor(table_file("epd-g7.5-d4")).provenance["heldout_rmse"]
        assert f"| 6 | 4 | 7.5 | not recorded | distilled | {error:.4g} |" in card
        assert "| 3 | 3 | not recorded | not recorded | not recorded | not recorded |" in card
        assert "num_inference_steps=3" in card
        assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "trust_remote_code=True" in card


def test_the_card_names_the_base_model_and_the_resolution(model, tmp_path):
    from reference import EXPS

    start = next(EXPS.rglob("sd15/start.pkl"))
    done = run(start, "--model", model, tmp_path / "out")
    assert "nothing was learned yet" in done.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model:\n- "stable-diffusion-v1-5/stable-diffusion-v1-5"' in card
    assert "| 30 | 20 | 7.5 |" in card


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m, o: o.mkdir(), "exists; give a folder that does not"),
        (
            lambda m, o: (m / "model_index.json").unlink(),
            "model_index.json: No such file .*expected a diffusers pipeline folder",
        ),
        (
            lambda m, o: (m / "scheduler" / "scheduler_config.json").write_text("{"),
            "scheduler_config.json: not valid JSON",
        ),
        (lambda m, o: (m / "scheduler" / "scheduler_config.json").write_text("[]"), "expected a JSON object"),
    ],
)
def test_bad_input_is_one_line(tables, tmp_path, damage, message):
    model, out = tmp_path / "model", tmp_path / "out"
    (model / "scheduler").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.00085}')
    damage(model, out)
    with pytest.raises(ValueError, match=message) as caught:
        run(*tables, "--model", model, out, catch_exceptions=False)
    assert "\n" not in str(caught.value)
