"""Distillation runs on SD3 and FLUX as on any other backbone, from the bank to the exported table."""

import sys
from pathlib import Path

import pytest
import torch

from solvers import load_predictor, resolve_predictor_path

from ..runs import DISTILL, invoke, overrides

sys.path.insert(0, str(Path(__file__).parents[2] / "backends"))
from tiny import save_tiny
from tiny_flow import save_flux, save_sd3

SAVE = {"sd15": save_tiny, "sd3_1024": save_sd3, "flux_dev": save_flux}


@pytest.mark.parametrize("name", SAVE)
def test_a_shipped_configuration_on_a_tiny_model(tmp_path, name):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat {i}" for i in range(10)))
    options = {"model_name_or_path": SAVE[name](tmp_path / "model"), "resolution": 64}
    if name != "sd15":
        options["max_sequence_length"] = 8
    settings = [
        *[f"backend.config.{k}={v}" for k, v in options.items()],
        "backend.dtype=float32",
        f"bank.folder={tmp_path / 'banks'}",
        f"bank.prompts={tmp_path / 'prompts.txt'}",
        "nodes.num_steps=3",
        "bank.pairs=4",
        "bank.heldout_pairs=2",
        "bank.shard_size=2",
        "train.steps=2",
        "train.batch=2",
        "evaluation.tuning_pairs=2",
        "evaluation.baselines=[euler]",
        "evaluation.interval=2",
        "teacher.check=2",
    ]
    config = DISTILL.configs / f"{name}.yaml"
    invoke(DISTILL.main, "--config", config, "--exps", tmp_path / "exps", *overrides(*settings))
    run = next((tmp_path / "exps").iterdir())
    predictor = load_predictor(resolve_predictor_path(str(run)))
    last = load_predictor(run / "export" / "network-snapshot-export-step000002.pkl")
    assert predictor.spec.backend == {"sd15": "ldm", "sd3_1024": "sd3", "flux_dev": "flux"}[name]
    assert not torch.equal(last.table.r, torch.tensor([[1 / 3, 2 / 3]] * 2, dtype=torch.float64))
