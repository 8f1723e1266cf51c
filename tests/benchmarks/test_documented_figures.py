"""The figures of README and docs are those that the benchmarks print from the committed results."""

import pytest
from click.testing import CliRunner

from benchmarks import report
from benchmarks.quality import distillation, grid_cells, rdpo, rdpo_tableaus
from benchmarks.speed import summary

README = (grid_cells.ROOT / "README.md").read_text()
RESULTS = (grid_cells.ROOT / "docs/results.md").read_text()
SPEED = (grid_cells.ROOT / "docs/speed.md").read_text()


def printed(command, *arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def figures(text: str) -> list[str]:
    """Lines of tables, and lines of ratios."""
    return [
        line.strip()
        for line in text.splitlines()
        if line.startswith("|") or " / " in line.split(":")[0] or line.startswith("--offload")
    ]


@pytest.mark.parametrize(
    "name", [*summary.PARTS, "overhead_cut", "overhead_cut_kept", "points_cut", "pipelines_cut"]
)
def test_what_a_speed_benchmark_prints_is_documented(name, tmp_path):
    (tmp_path / f"{name}.json").write_text((report.RESULTS / f"{name}.json").read_text())
    lines_printed = figures(printed(summary.main, "--results", str(tmp_path)))
    assert lines_printed
    assert not [line for line in lines_printed if line not in SPEED]


def test_the_tables_on_speed_hold_nothing_else():
    lines = printed(summary.main).splitlines()
    tables = [line for line in SPEED.splitlines() if line.startswith("|")]
    assert tables
    assert not [line for line in tables if line not in lines]


def test_the_documented_grid_is_what_show_prints():
    grid = figures(printed(distillation.main, "show"))
    assert len(grid) == 2 * (2 + 12)
    assert not [line for line in grid if line not in RESULTS.splitlines()]


def test_the_documented_results_of_rdpo_are_what_show_prints():
    names = ("gain", "recipes", "estimators", "policies", "tradeoff")
    lines = {line for name in names for line in printed(rdpo.main, "show", name).splitlines()}
    more = ("anchors", "families")
    lines |= {line for name in more for line in printed(rdpo_tableaus.main, "show", name).splitlines()}
    documented = [line for line in RESULTS[RESULTS.index("## RDPO") :].splitlines() if line.startswith("|")]
    assert len(documented) > 40
    assert [line for line in documented if line not in lines] == []


def test_the_table_of_the_readme_is_the_short_one():
    short = figures(printed(distillation.main, "show", "--short"))
    assert len(short) == 2 + 4
    assert not [line for line in short if line not in README.splitlines()]
