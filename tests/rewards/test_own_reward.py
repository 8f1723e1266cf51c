"""A reward of a user's own, my_module:MyReward: one class, used like the others if the user named it."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import evaluate
from common.plugins import allow_code
from rewards import check_reward, load_reward
from solvers import UserError

MODULE = '''
from rewards import Reward


class Brightness(Reward):
    """The mean of all pixels, to a power."""

    name = "brightness"

    def __init__(self, device, power: float = 1.0):
        super().__init__(device)
        self.power, self.options = power, {"power": power}

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) ** self.power


instance = Brightness("cpu")
'''
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the working directory; its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # restored: loading appends the working directory
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def test_a_reward_that_nobody_named_is_not_loaded(module):
    with pytest.raises(UserError, match=f"would run code of {module}.py"):
        load_reward(f"{module}:Brightness", {}, "cpu")
    assert module not in sys.modules


def test_one_class_is_a_reward_with_options_and_a_protocol(module, refused):
    name = f"{module}:Brightness"
    allow_code(name, f"{module}:instance")
    assert check_reward(name, {}) == []
    reward = load_reward(name, {"power": 2.0}, "cpu")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), IMAGES.mean((1, 2, 3)) ** 2)
    protocol = reward.protocol()
    assert (protocol["name"], protocol["version"], protocol["options"]) == ("brightness", "1", {"power": 2.0})
    with refused("unknown option 'powr'.*did you mean power"):
        check_reward(name, {"powr": 2.0})
    with refused("is an object, expected its class"):
        check_reward(f"{module}:instance", {})


def test_it_can_be_a_head_of_multi(module):
    name = f"{module}:Brightness"
    allow_code(name)
    config = {"weights": {name: 2.0}, "constants": {name: [0.0, 0.5]}, "configs": {name: {"power": 1.0}}}
    scores = load_reward("multi", config, "cpu")(IMAGES, PROMPTS)
    torch.testing.assert_close(scores, (2 * IMAGES.mean((1, 2, 3))).clamp(0, 1))


def test_the_command_line_scores_with_it(tmp_path, module):
    folder, name = tmp_path / "images", f"{module}:Brightness"
    folder.mkdir()
    for i, grey in enumerate((51, 204)):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    command = ["score", "--images", str(folder), "--prompts", "prompts.txt", "--device", "cpu"]
    command += ["--metrics", name, "--option", f"{name}.power=2"]
    result = CliRunner().invoke(evaluate.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (summary,) = (folder / "scores").glob("*.summary.json")
    assert json.loads(summary.read_text())["mean"] == pytest.approx((0.2**2 + 0.8**2) / 2, abs=1e-6)
