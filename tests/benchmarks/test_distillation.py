"""The grid of learned and classical solvers, on a few images; how its cells are made."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from omegaconf import OmegaConf

from benchmarks.quality import distillation, grid_cells, matched_baselines, teacher_reference
from benchmarks.quality.grid_cells import CELLS, Cell
from training.config import load_config
from training.distill.checks import check
from training.distill.config import DistillConfig

SHIPPED = grid_cells.ROOT / "exps" / "digits" / "grid"


def flat(values: dict, prefix: str = "") -> dict:
    """The values of nested sections by their dotted keys."""
    items: dict = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        items |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return items


DEFAULTS = flat(OmegaConf.to_container(OmegaConf.structured(DistillConfig)))


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
    assert start == f"exps/digits/grid/{before}-g3-d8.pkl"


def test_the_shipped_tables_were_made_with_these_configurations():
    shipped = grid_cells.configurations(SHIPPED)
    assert list(shipped) == [cell.name for cell in CELLS]
    assert {f"{name}.pkl" for name in shipped} == {path.name for path in SHIPPED.glob("*.pkl")}
    bases: dict[str, dict] = {}
    for cell in CELLS:
        arguments = cell.arguments(SHIPPED)
        if (path := arguments[1]) not in bases:
            bases[path] = flat(dataclasses.asdict(load_config(DistillConfig, Path(path))))
        overrides = [text.partition("=") for text in arguments[3::2]]
        expected = bases[path] | {key: yaml.safe_load(value) for key, _, value in overrides}
        assert DEFAULTS | flat(shipped[cell.name]) == expected


def test_the_shipped_logs_are_those_of_all_tables_in_order():
    lines = (SHIPPED / grid_cells.METRICS).read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines]
    assert list(dict.fromkeys(names)) == [cell.name for cell in CELLS]
    assert names == sorted(names, key=[cell.name for cell in CELLS].index)


def test_finished_cells_are_gathered_into_the_files_of_the_grid(tmp_path):
    grid_folder, work = tmp_path / "grid", tmp_path / "work"
    grid_folder.mkdir()
    first, second = CELLS[3], CELLS[0]
    for cell in (first, second):
        (work / cell.name).mkdir(parents=True)
        (work / cell.name / "resolved_config.yaml").write_text(
            f"guidance_scale: {cell.guidance}\nbank:\n  n: 1\n"
        )
        (work / cell.name / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
        grid_cells.gather(grid_folder, work)
    (work / "unfinished").mkdir()
    grid_cells.gather(grid_folder, work)
    assert list(grid_cells.configurations(grid_folder)) == [second.name, first.name]
    lines = (grid_folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": c.name, "step": i} for c in (second, first) for i in (0, 1)
    ]
    assert [path.name for path in work.iterdir()] == ["unfinished"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "CELLS", [Cell("epd", 7.5, 4), Cell("tableau1", 7.5, 4)])
        patch.setattr(distillation, "KINDS", ("epd", "tableau1"))
        patch.setattr(distillation, "DEPTHS", (4,))
        patch.setattr(distillation, "TUNING_IMAGES", 2)
        patch.setattr(matched_baselines, "BASELINES", ["euler", "heun", "dpmpp"])
        patch.setattr(matched_baselines, "SCHEDULES", ["discrete", "logsnr"])
        patch.setattr(matched_baselines, "SINGLE_EVALUATION", ("euler", "dpmpp"))
        patch.setattr(distillation, "TEACHER_INTERVALS", 4)
        patch.setattr(teacher_reference, "TEACHER_INTERVALS", 4)
        out = tmp_path_factory.mktemp("grid") / "grid.json"
        arguments = ["measure", "--n", "4", "--guidance", "7.5", "--out", str(out)]
        result = CliRunner().invoke(distillation.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        shown = CliRunner().invoke(distillation.main, ["show", "--results", str(out)], catch_exceptions=False)
        yield json.loads(out.read_text()), shown.output, out


def test_learned_tables_are_compared_at_the_same_depth_and_at_the_same_nfe(measured):
    rows = measured[0]["rows"]
    learned = {r["solver"]: r for r in rows if r["schedule"] == "learned"}
    assert {(name, r["depth"], r["evaluations"]) for name, r in learned.items()} == {
        ("epd", 4, 6),
        ("tableau1", 4, 4),
    }
    for row in learned.values():
        for cost in ("depth", "evaluations"):
            matched = [r for r in rows if r["schedule"] != "learned" and r[cost] == row[cost]]
            best = min(matched, key=lambda r: r["rmse"])
            compared = row[f"same_{cost}"]
            assert (compared["solver"], compared["rmse"]) == (best["solver"], best["rmse"])
            assert compared["ratio"] == pytest.approx(row["rmse"] / best["rmse"])
            assert compared["difference"] == pytest.approx(row["rmse"] - best["rmse"])
            assert compared["difference_halfwidth"] > 0
    assert {r["solver"] for r in rows if r["evaluations"] == r["depth"] == 6} == {"euler", "dpmpp"}
    best = min((r for r in rows if r["depth"] == 4 and r["schedule"] != "learned"), key=lambda r: r["rmse"])
    assert best["same_depth"]["ratio"] == 1
    assert best["same_depth"]["difference_halfwidth"] == 0


def test_the_summary_shows_both_costs(measured):
    shown = measured[1]
    assert "of the same serial depth" in shown
    assert "of the same NFE" in shown
    row = next(r for r in measured[0]["rows"] if r["solver"] == "epd")
    assert f"{row['same_evaluations']['ratio']:.2f} ± " in shown.split("of the same NFE")[1]


def test_rows_measured_otherwise_are_not_mixed(measured):
    result = CliRunner().invoke(
        distillation.main, ["measure", "--n", "5", "--guidance", "7.5", "--out", str(measured[2])]
    )
    assert result.exit_code == 1
    assert "remove it, or choose another --out" in str(result.exception)


class TuningErrors:
    """In place of the reference of the tuning seeds, for samplers that are the names of their schedules."""

    def error(self, schedule: str) -> float:
        return {"discrete": 2.0, "logsnr": 1.0, "polynomial": 3.0}[schedule]


def test_schedules_of_baselines_are_chosen_on_the_tuning_seeds(monkeypatch):
    monkeypatch.setattr(matched_baselines, "SCHEDULES", ["discrete", "logsnr", "polynomial"])
    monkeypatch.setattr(matched_baselines, "sampler_of", lambda *args: args[-1])
    monkeypatch.setattr(
        matched_baselines.MatchedComparison, "measure", lambda self, name, sampler, schedule: (name, schedule)
    )
    reference = teacher_reference.TeacherReference(None, 1.0, None, 1, None)  # it has no errors to choose by
    comparison = matched_baselines.MatchedComparison(reference, TuningErrors(), None, {}, Path())
    assert comparison.baselines(["euler"], 4) == [("euler", "logsnr")]
