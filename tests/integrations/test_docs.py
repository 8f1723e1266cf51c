"""The scripts and the names of docs/diffusers.md and docs/comfyui.md are those that work."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from reference import table_file

from solvers.predictor.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """The folder of the embedded pipeline, in float32."""
    folder = tmp_path_factory.mktemp("model")
    digits["ldm"].pipe.save_pretrained(folder / "digits")
    return folder / "digits"


def test_the_shortest_script_and_parallel_points(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, _, second, _ = blocks("diffusers.md")  # the second: tests/training/distill/test_own_model.py
    code = first.replace('"MODEL"', repr(str(folder))).replace(
        '"exps/MY_RUN"', repr(str(table_file("epd-g7.5-d4")))
    )
    names: dict = {}
    exec(compile(code, "docs/diffusers.md", "exec"), names)
    assert (tmp_path / "image.png").stat().st_size > 500
    exec(compile(second, "docs/diffusers.md", "exec"), names)


def test_the_k_diffusion_script():
    def model(x, sigma, **extra_args):
        return x / (1 + sigma.view(-1, 1) ** 2)

    code = blocks("diffusers.md")[3].replace('"exps/MY_RUN"', repr(str(table_file("epd-g7.5-d4"))))
    names = {"torch": torch, "model": model, "noise": torch.randn(2, 3), "extra_args": {}}
    exec(compile(code, "docs/diffusers.md", "exec"), names)
    assert names["x"].shape == (2, 3)


@pytest.mark.parametrize("page", ["diffusers.md", "comfyui.md"])
def test_commands_work_and_pictures_are_there(page, folder, tmp_path):
    text = (DOCS / page).read_text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (DOCS / name).stat().st_size > 1000
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    places = {
        "exps/MY_RUN": table_file("epd-g7.5-d4"),
        "MODEL": folder,
        "/path/to/ComfyUI": tmp_path / "ComfyUI",
    }
    places |= {"my-scheduler": tmp_path / "scheduler", "my-pipeline": tmp_path / "pipeline"}
    commands = re.findall(r"^    python -m solvers\.predictor (.*)$", text, re.M)
    assert commands
    for command in commands:
        if "/path/to/finetune" in command:  # tests/training/distill/test_own_model.py
            continue
        arguments = [str(places.get(word, word)) for word in command.split()]
        assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    for name in re.findall(r"`(tests/integrations/\S+?|integrations/\S+?)`", text):
        assert (DOCS.parent / name).exists()
