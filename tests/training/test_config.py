"""Options of a backbone that no training can use are refused before anything loads."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from training.config import ConfigError
from training.distill import launch as distill
from training.ppo import launch as ppo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("main", "config", "key"),
    [
        (distill.main, "training/distill/cfgs/digits.yaml", "backend.config.offload"),
        (ppo.main, "training/ppo/cfgs/digits.yaml", "model.backend_options.offload"),
    ],
)
def test_offload(main, config, key):
    def run(value):
        arguments = ["--config", str(ROOT / config), "--override", f"{key}={value}", "--dry-run"]
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    with pytest.raises(ConfigError, match=f"^{key} is true, but training encodes prompts as it goes"):
        run("true")
    assert run("false").exit_code == 0
