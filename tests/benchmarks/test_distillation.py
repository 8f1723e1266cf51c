"""The grid of learned and classical solvers, on a few images; how its cells are made."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import bench, distillation, grid
from benchmarks.distillation import CELLS, Cell
from training.config import load_config
from training.distill.checks import check
from training.distill.config import DistillConfig

SHIPPED = distillation.ROOT / "exps" / "digits-distilled"


def configuration(cell: Cell) -> DistillConfig:
    arguments = cell.arguments(SHIPPED)
    return load_config(
        DistillConfig,
        Path(arguments[1]),
        [arguments[i + 1] for i, a in enumerate(arguments) if a == "--override"],
    )


def test_every_cell_has_a_configuration_that_passes():
    students = {}
    for cell in [c for c in CELLS if (c.guidance, c.depth) in ((7.5, 6), (1.0, 4))]:
        config = configuration(cell)
        check(config)
        assert config.guidance_scale == cell.guidance
        students[cell.kind] = config.student
    assert students["plugin"].max_order == 2
    assert students["epd"].max_order == 1
    wide = [students[f"wide{k}"] for k in (2, 3, 4)]
    assert [s.first_points for s in wide] == [s.num_points for s in wide] == [2, 3, 4]


@pytest.mark.parametrize("kind, before", [("wide2", "tableau2"), ("wide3", "wide2"), ("wide4", "wide3")])
def test_a_wide_tableau_starts_from_the_one_before_it(kind, before):
    start = configuration(Cell(kind, 3.0, 8)).student.start
    assert start == f"exps/digits-distilled/{before}-g3-d8/network-snapshot-export-best.pkl"


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_shipped_tables_were_made_with_these_configurations(cell):
    assert load_config(DistillConfig, SHIPPED / cell.name / "resolved_config.yaml", []) == configuration(cell)


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
    assert {(name, r["depth"], r["evaluations"]) for name, r in learned.items()} == {
        ("epd", 4, 6),
        ("tableau1", 4, 4),
    }
    for row in learned.values():
        for cost in ("depth", "evaluations"):
            theirs = [r for r in rows if r["schedule"] != "learned" and r[cost] == row[cost]]
            best = min(theirs, key=lambda r: r["rmse"])
            found = row[f"same_{cost}"]
            assert (found["solver"], found["rmse"]) == (best["solver"], best["rmse"])
            assert found["ratio"] == pytest.approx(row["rmse"] / best["rmse"])
            assert found["difference"] == pytest.approx(row["rmse"] - best["rmse"])
            assert found["difference_halfwidth"] > 0
    assert {r["solver"] for r in rows if r["evaluations"] == 6 and r["depth"] == 6} == set(
        grid.SAME_EVALUATIONS
    )
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
    result = CliRunner().invoke(
        distillation.main, ["measure", "--n", "4", "--guidance", "7.5", "--out", str(measured[2])]
    )
    assert result.exit_code == 1
    assert "remove it, or choose another --out" in str(result.exception)
