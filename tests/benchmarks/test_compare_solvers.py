"""The comparison of all solvers by depth, on a few images."""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from backends import load_backend
from benchmarks.quality import compare_solvers, teacher_reference
from benchmarks.report import mean_and_halfwidth, text_table
from solvers import Predictor, SolverTable, Spec, compile_tableau, discrete, save_predictor
from training.distill.bank import rmse_per_image


@pytest.mark.parametrize("name", teacher_reference.SOLVERS)
@pytest.mark.parametrize("depth", [4, 5, 6])
def test_solvers_have_the_serial_depth_they_are_listed_at(name, depth):
    if teacher_reference.has_depth(name, depth):
        solver, num_steps = teacher_reference.solver_of(name, depth)
        assert compile_tableau(solver, torch.linspace(2, 1, num_steps)).depth == depth
    else:
        assert name in ("heun", "dpm2", "dpm", "epd-start", "epd-plugin-start")


def test_the_comparison_states_costs_and_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_solvers, "TUNING_IMAGES", 2)
    monkeypatch.setattr(compare_solvers, "schedules_of", lambda backend: ["discrete", "logsnr"])
    monkeypatch.setattr(teacher_reference, "EXPS", tmp_path)
    predictor = Predictor(
        SolverTable.uniform(3, 2),
        Spec(guidance_rate=7.5),
        discrete(4, load_backend(Spec(backend="digits"), "cpu").noise_schedule),
    )
    save_predictor(predictor, tmp_path / "digits" / "grid" / "epd-g7.5-d6.pkl")
    arguments = ["--n", "4", "--depths", "4,6", "--solvers", "euler,epd-start", "--intervals", "4"]
    arguments += ["--out", str(tmp_path)]
    result = CliRunner().invoke(compare_solvers.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads((tmp_path / "solvers.json").read_text())
    rows = {(r["solver"], r["depth"]): r for r in written["rows"]}
    expected = {("teacher: dpm2, 4 intervals", 8)}
    expected |= {(name, depth) for name in ("euler", "epd-start") for depth in (4, 6)}
    assert set(rows) == expected | {("epd distilled", 6)}
    assert rows["epd distilled", 6]["evaluations"] == 9
    assert rows["teacher: dpm2, 4 intervals", 8]["rmse"] == 0
    assert rows["epd-start", 6]["evaluations"] == 9
    assert rows["euler", 6]["evaluations"] == 6
    assert all(r["rmse"] > 0 and r["rmse_halfwidth"] > 0 for r in written["rows"][1:])
    assert written["settings"]["teacher_error"] > 0
    assert (tmp_path / "solvers.md").read_text() in result.output
    assert Image.open(tmp_path / "solvers.png").size[0] > 500


def test_statistics():
    mean, half = mean_and_halfwidth(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, half) == (2.5, pytest.approx(1.96 * (5 / 3) ** 0.5 / 2))
    a, b = (
        torch.zeros(2, 1, 2, 2),
        torch.stack([torch.full((1, 2, 2), 3.0), torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])]),
    )
    assert rmse_per_image(a, b).tolist() == [3.0, 1.0]
    assert text_table(["a", "b"], [["x", "10"]]) == "| a |  b |\n|---|---:|\n| x | 10 |"
