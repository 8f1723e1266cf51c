"""The committed start tables are what the committed command writes."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backends import load_backend
from solvers import load_predictor
from training.start_tables import main, starts

EXPS = Path(__file__).parents[2] / "exps"


def test_the_command_writes_the_committed_files(tmp_path):
    result = CliRunner().invoke(main, ["--exps", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    for start in starts():
        made, kept = load_predictor(tmp_path / start.path), load_predictor(EXPS / start.path)
        assert made.spec == kept.spec
        assert torch.equal(made.table.r, kept.table.r)
        assert torch.allclose(made.sigmas, kept.sigmas, rtol=1e-12, atol=0)


@pytest.mark.parametrize("start", starts(), ids=lambda s: s.path)
def test_tables_are_equally_spaced_and_complete(start):
    predictor = load_predictor(EXPS / start.path)
    assert predictor.table.r[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert predictor.table.w[0].tolist() == [0.5, 0.5]
    assert len(predictor.sigmas) == predictor.spec.num_steps == predictor.table.num_intervals + 1
    assert predictor.cost().depth == 2 * predictor.table.num_intervals


def test_nodes_are_those_of_the_backbone():
    """The digits backbone, which has Stable Diffusion's betas, gives the stored nodes of its own table."""
    predictor = load_predictor(EXPS / "digits/start.pkl")
    assert torch.allclose(
        load_backend(predictor.spec, "cpu").sigmas(predictor.spec), predictor.sigmas, rtol=1e-6
    )
