"""The grid of learned and classical solvers, on a few images; how its cells are made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import bench, distillation, grid
from benchmarks.distillation import CELLS, Cell
from solvers import load_predictor, save_predictor
from training.config import load_config
from training.distill.config import DistillConfig, check

SHIPPED = distillation.ROOT / "exps" / "digits-distilled"
FILE = "network-snapshot-export-best.pkl"


def test_every_cell_has_a_configuration_that_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(Cell, "narrower", lambda self, folder: tmp_path)
    costs = {}
    for cell in [c for c in CELLS if (c.guidance, c.depth) in ((7.5, 6), (1.0, 4))]:
        arguments = cell.arguments(tmp_path)
        overrides = [arguments[i + 1] for i, a in enumerate(arguments) if a == "--override"]
        config = load_config(DistillConfig, Path(arguments[1]), overrides)
        check(config)
        assert config.guidance_scale == cell.guidance
        costs[cell.kind] = config.student
    assert costs["plugin"].max_order == 2
    assert costs["epd"].max_order == 1
    assert [costs[f"wide{k}"].first_points for k in (2, 3, 4)] == [costs[f"wide{k}"].num_points for k in (2, 3, 4)] == [2, 3, 4]


def test_a_wide_tableau_starts_from_the_better_narrow_one(tmp_path):
    cell = Cell("wide2", 3.0, 4)
    for kind, error in (("tableau1", 0.3), ("tableau2", 0.2)):
        predictor = load_predictor(SHIPPED / f"{kind}-g3-d4" / FILE)
        told = replace(predictor, provenance=predictor.provenance | {"heldout_rmse": error})
        save_predictor(told, tmp_path / f"{kind}-g3-d4" / FILE)
    assert cell.narrower(tmp_path) == tmp_path / "tableau2-g3-d4" / FILE


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "CELLS", [Cell("epd", 7.5, 4), Cell("tableau1", 7.5, 4)])
        patch.setattr(distillation, "KINDS", ("epd", "tableau1"))
        patch.setattr(distillation, "DEPTHS", (4,))
        patch.setattr(distillation, "TUNING_IMAGES", 4)
        patch.setattr(grid, "BASELINES", ["euler", "heun", "dpmpp"])
        patch.setattr(grid, "SCHEDULES", ["discrete", "logsnr"])
        patch.setattr(distillation, "TEACHER_INTERVALS", 8)
        patch.setattr(bench, "TEACHER_INTERVALS", 8)
        out = tmp_path_factory.mktemp("grid") / "grid.json"
        arguments = ["measure", "--n", "6", "--guidance", "7.5", "--out", str(out)]
        result = CliRunner().invoke(distillation.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        shown = CliRunner().invoke(distillation.main, ["show", "--results", str(out)], catch_exceptions=False)
        yield json.loads(out.read_text()), shown.output, out


def test_rivals_have_the_same_depth_or_as_many_evaluations(measured):
    rows = measured[0]["rows"]
    learned = {r["solver"]: r for r in rows if r["schedule"] == "learned"}
    assert {(name, r["depth"], r["evaluations"]) for name, r in learned.items()} == {("epd", 4, 6), ("tableau1", 4, 4)}
    for row in learned.values():
        for cost in ("depth", "evaluations"):
            theirs = [r for r in rows if r["schedule"] != "learned" and r[cost] == row[cost]]
            best = min(theirs, key=lambda r: r["rmse"])
            found = row[f"same_{cost}"]
            assert (found["solver"], found["rmse"]) == (best["solver"], best["rmse"])
            assert found["ratio"] == pytest.approx(row["rmse"] / best["rmse"])
            assert found["difference"] == pytest.approx(row["rmse"] - best["rmse"])
            assert found["difference_halfwidth"] > 0
    assert {r["solver"] for r in rows if r["evaluations"] == 6 and r["depth"] == 6} == set(grid.SAME_EVALUATIONS)
    best = min((r for r in rows if r["depth"] == 4 and r["schedule"] != "learned"), key=lambda r: r["rmse"])
    assert best["same_depth"]["ratio"] == 1
    assert best["same_depth"]["difference_halfwidth"] == 0


def test_the_summary_shows_both_costs(measured):
    shown = measured[1]
    assert "of the same depth" in shown
    assert "of as many evaluations" in shown
    row = next(r for r in measured[0]["rows"] if r["solver"] == "epd")
    assert f"{row['same_evaluations']['ratio']:.2f} ± " in shown.split("as many evaluations")[1]


def test_rows_measured_otherwise_are_not_mixed(measured):
    result = CliRunner().invoke(distillation.main, ["measure", "--n", "4", "--guidance", "7.5", "--out", str(measured[2])])
    assert result.exit_code == 1
    assert "remove it, or choose another --out" in str(result.exception)
