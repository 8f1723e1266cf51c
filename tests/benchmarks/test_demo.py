"""./launch.sh demo on a few images: four parts, tables of what was measured, the report."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.demo import __main__ as demo
from benchmarks.demo import families, learning, solvers
from benchmarks.quality import teacher_reference
from common.statistics import estimate


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> tuple[Path, str]:
    """What a demo of the smallest size printed, and its folder."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_reference, "TEACHER_INTERVALS", 4)
        patch.setattr(demo, "TUNING_IMAGES", 2)
        patch.setattr(solvers, "schedules_of", lambda backend: ["time_uniform"])
        for name, value in {"PAIRS": 4, "HELD_OUT": 2, "STEPS": 2, "RDPO_STEPS": 2, "UNSEEN": 4}.items():
            patch.setattr(learning, name, value)
        patch.setattr(learning, "RDPO_IMAGES", 2)
        small = ["bank.shard_size=4", "train.batch=4", "train.chunk=4", "teacher.inner=3"]
        small += ["evaluation.tuning_pairs=2", "evaluation.baselines=[euler]"]
        patch.setattr(learning, "DISTILL", [*learning.DISTILL, *small])
        patch.setattr(learning, "RDPO", ["ppo.rollout_batch_size=8", "ppo.minibatch_size=8"])
        patch.setattr(families, "SEEDS", "0-1")
        patch.setattr(families, "TEACHER_NODES", 5)
        arguments = ["--images", "12", "--out", str(out), "--device", "cpu"]
        result = CliRunner().invoke(demo.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return out, result.output


def tables(text: str) -> list[list[list[str]]]:
    """The Markdown tables of a text, as cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[[c.strip() for c in line.strip("|").split("|")] for line in b.splitlines()] for b in blocks]


def test_each_part_has_a_progress_line(printed):
    assert re.findall(r"^\[(\d)/4\] ", printed[1], re.M) == list("1234")


def test_at_most_eight_rows_sorted_by_error_at_equal_depth_and_nfe(printed):
    comparison = tables(printed[1])[0][2:]
    assert len(comparison) <= 8
    errors = [float(row[3].split(" ±")[0]) for row in comparison]
    assert errors == sorted(errors)
    ours = [row for row in comparison if "shipped" in row[0]]
    assert len(ours) == 3
    for _, depth, nfe, *_ in ours:
        assert any(row[1] == depth and "shipped" not in row[0] for row in comparison)
        assert any(row[2] == nfe and "shipped" not in row[0] for row in comparison)


def test_the_table_distilled_now_stands_beside_the_shipped_one(printed):
    names = {row[0] for row in tables(printed[1])[1]}
    assert {"tableau K=1, distilled now", "tableau K=1, shipped"} < names


def test_gains_have_intervals_on_the_same_images(printed):
    header, _, first, now, shipped = tables(printed[1])[2]
    assert header[2] == "gain over distilled [95 %]"
    assert first[2] == "–"
    assert all(re.fullmatch(r"[+-]\S+ \[[+-]\S+, [+-]\S+\]", row[2]) for row in (now, shipped))
    assert (now[0], shipped[0]) == ("EPD, tuned now (2 steps)", "EPD, shipped tuned (80 steps)")


def test_a_gain_is_stated_only_where_its_interval_shows_one():
    spread = torch.linspace(-1, 1, 40).tolist()
    prompts = [str(i) for i in range(40)]
    assert learning.outcome(estimate(spread, prompts)) == "no gain that these images could show"
    assert learning.outcome(estimate([v + 2 for v in spread], prompts)) == "a gain beyond chance"
    assert learning.outcome(estimate([v - 2 for v in spread], prompts)) == "a loss beyond chance"


def test_three_families_are_in_the_report_with_their_teachers(printed):
    out, text = printed
    page = (out / "report.html").read_text()
    assert re.findall('<h2 id="family-[^"]+">([^<]+)', page) == [
        f"Digits · {name} layout" for name in ("Stable Diffusion", "Stable Diffusion 3", "FLUX.1")
    ]
    assert page.count('<th scope="col">teacher: DPM-Solver-2') == 3
    assert len(page) < 1_500_000
    for name in families.NAMES:
        assert json.loads((out / name / "teacher/manifest.jsonl").read_text().splitlines()[0])["depth"] == 8
        assert f"{name}:\ndigits at depth 4: EPD distilled" in text


def test_it_ends_with_what_to_do_next_and_the_page(printed):
    out, text = printed
    ending = text.split("What to do next:\n")[1]
    assert len([line for line in ending.splitlines() if line.startswith(("python ", "./launch.sh "))]) == 3
    assert text.endswith(f"report: {(out / 'report.html').resolve()}\n")
    assert Image.open(out / "solvers.png").size[0] > 500


def test_its_own_lines_fit_a_hundred_columns(printed):
    skip = re.compile(r"^(best |wrote |report:)|" + re.escape(str(printed[0])))  # of runs, and paths
    own = [line for line in printed[1].splitlines() if not skip.search(line)]
    assert [line for line in own if len(line) > 100] == []
