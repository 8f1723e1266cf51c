"""A report of several backbones: nothing is compared across them, and each has a headline."""

import re

import pytest

from evaluation.comparison import load_runs
from evaluation.naming import run_names
from evaluation.report.families import families_of
from evaluation.verdicts import verdict_lines

LDM, SD3 = {"backbone": "ldm: runway/sd15"}, {"backbone": "sd3: stabilityai/sd3"}
LEARNED = {"solver": "epd", "predictor": "0" * 64, "depth": 4, "evaluations": 6}


def baseline(solver: str, cost: int) -> dict:
    return {"solver": solver, "depth": cost, "evaluations": cost}


@pytest.fixture(scope="module")
def folders(evaluation, tmp_path_factory):
    """Two backbones; the baselines of the first are lighter, and score differently."""
    root = tmp_path_factory.mktemp("families")
    made = {
        "epd": evaluation.make(root / "epd", **LDM | LEARNED),
        "euler4": evaluation.make(root / "euler4", light=0.5, **LDM | baseline("euler", 4)),
        "dpmpp4": evaluation.make(root / "dpmpp4", light=0.7, **LDM | baseline("dpmpp", 4)),
        "euler6": evaluation.make(root / "euler6", light=0.6, **LDM | baseline("euler", 6)),
        "fine": evaluation.make(root / "fine", light=0.9, **LDM | baseline("dpm2", 128)),
        "euler4-sd3": evaluation.make(root / "euler4-sd3", light=0.3, **SD3 | baseline("euler", 4)),
        "epd-sd3": evaluation.make(root / "epd-sd3", light=0.4, **SD3 | LEARNED),
    }
    for folder in made.values():
        evaluation.score(folder)
    return made


@pytest.fixture(scope="module")
def families(folders):
    runs = load_runs(list(folders.values()), ["digits", "judge"])
    return families_of(runs, {}, [folders["fine"]])


def test_backbones_are_apart_and_the_teacher_is_first(families, folders):
    first, second = families
    assert [first.name, second.name] == ["Stable Diffusion (sd15)", "Stable Diffusion 3 (sd3)"]
    assert [entry.name for entry in first.entries] == [
        "teacher: DPM-Solver-2 · depth 128 · 128 NFE",
        "EPD · depth 4 · 6 NFE",
        "Euler · depth 4 · 4 NFE",
        "DPM++ 2M · depth 4 · 4 NFE",
        "Euler · depth 6 · 6 NFE",
    ]
    assert [e.run.folder.name for e in second.entries] == ["euler4-sd3", "epd-sd3"]
    assert first.reference.run.folder == folders["epd"]
    assert second.reference.run.folder == folders["euler4-sd3"]


def test_differences_are_to_the_reference_of_the_same_family(families):
    for family in families:
        own = {str(entry.run.folder) for entry in family.entries}
        rows = [row for _, by_metric in family.differences() for row in by_metric.values()]
        assert len(rows) == 2 * (len(family.entries) - 1)
        assert {row["against"] for row in rows} == {str(family.reference.run.folder)}
        assert {row["run"] for row in rows} <= own


def test_headlines_name_the_best_baseline_of_each_cost(families, folders, evaluation):
    first = families[0]
    depth, nfe = first.headline()
    assert (depth.costs, nfe.costs) == (("depth",), ("evaluations",))
    assert depth.learned.folder == nfe.learned.folder == folders["epd"]
    means = {name: evaluation.summary(folders[name], "digits")["mean"] for name in ("euler4", "dpmpp4")}
    assert depth.baseline.folder == folders[max(means, key=means.get)]
    assert nfe.baseline.folder == folders["euler6"]
    difference = evaluation.summary(folders["epd"], "digits")["mean"] - max(means.values())
    assert depth.row["difference"]["mean"] == pytest.approx(difference)
    (only,) = families[1].headline()
    assert only.costs == ("depth",)
    assert "teacher" not in first.solver_of(depth.baseline)


def test_the_outcome_is_that_of_the_interval(families):
    for verdict in families[0].verdicts():
        low, high = verdict.interval
        assert verdict.outcome == ("higher" if low > 0 else "lower" if high < 0 else "unclear")


def test_verdict_lines_read_as_sentences(families):
    lines = verdict_lines(families[0].runs, {})
    assert len(lines) == 4
    pattern = (
        r"digits at depth 4: EPD \(trained on it\?\) \S+, best baseline (Euler|DPM\+\+ 2M) \S+"
        r" \([+-]\S+ \[[+-]\S+, [+-]\S+\]\)"
    )
    assert re.fullmatch(pattern, lines[0])
    assert lines[1].startswith("digits at NFE 6: EPD")


def test_names_of_one_family_are_all_different(evaluation, tmp_path):
    settings = [LEARNED, LEARNED, LEARNED | {"guidance": 3.0}]
    made = [evaluation.make(tmp_path / f"run{i}", **LDM | s) for i, s in enumerate(settings)]
    for folder in made:
        evaluation.score(folder, metrics="digits")
    runs = load_runs(made, ["digits"])
    assert run_names(runs[:2], {}) == [f"EPD · depth 4 · 6 NFE (run{i})" for i in range(2)]
    assert run_names(runs[1:], {}) == [f"EPD · depth 4 · 6 NFE · guidance {g}" for g in ("7.5", "3")]
    (family,) = families_of(runs, {}, [])
    assert [entry.solver for entry in family.entries] == [f"EPD, guidance {g}" for g in ("7.5", "7.5", "3")]


def test_the_page_has_a_section_a_family(evaluation, folders, tmp_path):
    runs = [part for name, f in folders.items() if name != "fine" for part in ("--run", f)]
    out = tmp_path / "page.html"
    evaluation.run("report", *runs, "--teacher", folders["fine"], "--out", out)
    text = out.read_text()
    assert re.findall('<h2 id="(family-[^"]+)">([^<]+)', text) == [
        ("family-1", "Stable Diffusion (sd15)"),
        ("family-2", "Stable Diffusion 3 (sd3)"),
    ]
    assert text.count('class="headline"') == 2
    assert "the best baseline at equal depth" in text
    assert text.index("teacher: DPM-Solver-2") < text.index("seed 0: ")
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert len(tables) == len(re.findall(r'<div class="scroll[^>]*tabindex="0">\s*<table', text))
    assert len(text) < 1_500_000


def test_a_teacher_alone_is_refused(evaluation, folders, tmp_path):
    message = evaluation.refused(
        "report", "--run", folders["epd-sd3"], "--teacher", folders["fine"], "--out", tmp_path / "page.html"
    )
    assert message.startswith(f"--teacher {folders['fine']}: Stable Diffusion (sd15) has no other run")
