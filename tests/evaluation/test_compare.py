"""evaluate.py compare: the numbers of a pair of runs, and the pairs it refuses."""

import html
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from common.statistics import BOOTSTRAP, STUDENT
from evaluation.tables import STUDENT_NOTE


@pytest.fixture
def copies(scored, tmp_path):
    """The two scored runs, to be written to."""
    return tuple(shutil.copytree(run, tmp_path / run.name) for run in scored)


def rewrite(folder, metric, change):
    """Change the lines of a metric and its summary's count and mean with them."""
    path, summary_file = folder / f"scores/{metric}.jsonl", folder / f"scores/{metric}.summary.json"
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads(summary_file.read_text()) | {
        "count": len(lines),
        "mean": float(np.mean([line["score"] for line in lines])),
    }
    summary_file.write_text(json.dumps(summary))


def comparison(evaluation, tmp_path, *arguments):
    evaluation.run("compare", *arguments, "--out", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)["comparisons"]


def test_a_run_is_no_different_from_itself(evaluation, scored, tmp_path):
    rows = comparison(evaluation, tmp_path, "--run", scored[0], "--run", scored[0])
    assert [row["metric"] for row in rows] == ["digits", "judge"]
    for row in rows:
        assert (
            row["difference"]["mean"],
            row["difference"]["standard_error"],
            row["difference"]["interval"],
        ) == (0, 0, [0, 0])
        assert (row["win_rate"], row["sign_test_p"], row["ties"]) == (0.5, 1, 8)


def test_the_numbers_are_those_of_the_lines(evaluation, scored, tmp_path):
    first, second = ([line["score"] for line in evaluation.lines(run, "judge")] for run in scored)
    differences = np.subtract(second, first)
    (row,) = comparison(evaluation, tmp_path, "--run", scored[0], "--run", scored[1], "--metrics", "judge")
    assert row["difference"]["mean"] == pytest.approx(differences.mean())
    by_prompt = differences.reshape(4, 2).mean(1)
    assert row["difference"]["standard_error"] == pytest.approx(stats.sem(by_prompt))
    exact = stats.t.interval(0.95, 3, by_prompt.mean(), stats.sem(by_prompt))
    assert row["difference"]["interval"] == pytest.approx(list(exact), rel=1e-3)
    wins = int((differences > 0).sum())
    assert (row["wins"], row["losses"], row["win_rate"]) == (wins, 8 - wins, wins / 8)
    prompt_wins = int((by_prompt > 0).sum())
    assert (row["prompt_wins"], row["prompt_ties"], row["prompt_losses"]) == (prompt_wins, 0, 4 - prompt_wins)
    assert row["sign_test_p"] == pytest.approx(stats.binomtest(prompt_wins, 4).pvalue)
    (back,) = comparison(evaluation, tmp_path, "--run", scored[1], "--run", scored[0], "--metrics", "judge")
    assert back["difference"]["mean"] == pytest.approx(-row["difference"]["mean"])
    assert back["win_rate"] == 1 - row["win_rate"]


def test_ties_count_half(evaluation, copies, tmp_path):
    def level(lines):
        return [line | {"score": float(line["seed"] < 5)} for line in lines]

    rewrite(copies[0], "digits", lambda lines: [line | {"score": 0.0} for line in lines])
    rewrite(copies[1], "digits", level)
    (row,) = comparison(evaluation, tmp_path, "--run", copies[0], "--run", copies[1], "--metrics", "digits")
    assert (row["wins"], row["ties"], row["losses"]) == (5, 3, 0)
    assert row["win_rate"] == (5 + 1.5) / 8
    assert (row["prompt_wins"], row["prompt_ties"], row["prompt_losses"]) == (3, 1, 0)
    assert row["sign_test_p"] == 2 / 2**3
    assert row["difference"]["mean"] == 5 / 8


def test_the_sign_test_counts_prompts_not_images(evaluation, copies, tmp_path):
    """Seven images of eight win, but only as much as the eighth loses for its prompt."""
    scores = {0: 1.0, 1: -3.0}
    rewrite(copies[0], "digits", lambda lines: [line | {"score": 0.0} for line in lines])
    rewrite(
        copies[1], "digits", lambda lines: [line | {"score": scores.get(line["seed"], 1.0)} for line in lines]
    )
    (row,) = comparison(evaluation, tmp_path, "--run", copies[0], "--run", copies[1], "--metrics", "digits")
    assert (row["wins"], row["ties"], row["losses"]) == (7, 0, 1)
    assert (row["prompt_wins"], row["prompt_ties"], row["prompt_losses"]) == (3, 0, 1)
    assert row["sign_test_p"] == stats.binomtest(3, 4).pvalue


def test_intervals_over_few_prompts_are_said_to_be_students_t(evaluation, copies, tmp_path):
    assert evaluation.run("compare", "--run", copies[0], "--run", copies[1]).splitlines()[-1] == STUDENT_NOTE
    many = [
        evaluation.make(tmp_path / name, range(20), light=light) for name, light in (("a", 1.0), ("b", 0.5))
    ]
    assert evaluation.score(copies[0]).splitlines()[-1] == STUDENT_NOTE
    assert "Student" not in evaluation.score(many[0], metrics="digits") + evaluation.score(
        many[1], metrics="digits"
    )
    assert "Student" not in evaluation.run("compare", "--run", many[0], "--run", many[1])
    assert evaluation.summary(many[0], "digits")["method"] == BOOTSTRAP
    assert evaluation.summary(copies[0], "digits")["method"] == STUDENT
    for runs, method, other in (
        (copies, STUDENT_NOTE, "bootstrap"),
        (many, "bootstrap over prompts", "Student"),
    ):
        evaluation.run("report", "--run", runs[0], "--run", runs[1], "--out", tmp_path / "page.html")
        page = html.unescape((tmp_path / "page.html").read_text())
        assert method in page
        assert other not in page


def test_the_order_of_the_lines_does_not_matter(evaluation, copies, tmp_path):
    before = comparison(evaluation, tmp_path, "--run", copies[0], "--run", copies[1])
    rewrite(copies[1], "judge", lambda lines: lines[::-1])
    assert comparison(evaluation, tmp_path, "--run", copies[0], "--run", copies[1]) == before


def test_the_table_is_markdown_and_marks_what_was_trained_on(evaluation, copies):
    summary_file = copies[1] / "scores/judge.summary.json"
    summary_file.write_text(json.dumps(json.loads(summary_file.read_text()) | {"trained_on": True}))
    lines = evaluation.run("compare", "--run", copies[0], "--run", copies[1]).splitlines()
    assert lines[0] == "differences to first"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0][0] == "run"
    assert "sign test p (prompts)" in rows[0]
    assert [(row[0], row[1], row[-1]) for row in rows[2:]] == [
        ("second", "digits", "no"),
        ("second", "judge", "this run"),
    ]


def refusal(evaluation, copies, *more):
    message = evaluation.refused("compare", "--run", copies[0], "--run", copies[1], *more)
    assert str(copies[0]) in message
    assert str(copies[1]) in message
    return message


def test_unlike_protocols_are_refused(evaluation, copies):
    summary_file = copies[1] / "scores/digits.summary.json"
    summary = json.loads(summary_file.read_text())
    summary["protocol"]["weights"] = ["0123456789abcdef"]
    summary_file.write_text(json.dumps(summary))
    message = refusal(evaluation, copies)
    assert "unlike protocols of digits: weights" in message
    assert "0123456789abcdef" in message


@pytest.mark.parametrize("which", [0, 1])
def test_unpaired_sets_are_refused(evaluation, copies, which):
    rewrite(copies[which], "digits", lambda lines: lines[:-2])
    message = refusal(evaluation, copies, "--metrics", "digits")
    assert f"{copies[1 - which]} has prompt" in message
    assert "with seed 6" in message
    assert "(2 such)" in message


def test_a_pair_that_is_there_twice_is_refused(evaluation, copies):
    rewrite(copies[1], "digits", lambda lines: [*lines[:-1], lines[0] | {"file": "again.png"}])
    message = evaluation.refused("compare", "--run", copies[0], "--run", copies[1], "--metrics", "digits")
    assert f"{copies[1]}: 000000.png and again.png both have prompt" in message


def test_missing_scores_are_refused(evaluation, copies):
    (copies[1] / "scores/judge.summary.json").unlink()
    assert "has no judge scores" in refusal(evaluation, copies)
    evaluation.run("compare", "--run", copies[0], "--run", copies[1], "--metrics", "digits")
    assert "has no hps scores; run evaluate.py score --images" in evaluation.refused(
        "compare", "--run", copies[0], "--run", copies[1], "--metrics", "hps"
    )


def test_unfinished_and_stale_scores_are_refused(evaluation, copies):
    part = copies[1] / "scores/digits.part00000.jsonl"
    part.touch()
    assert "was not finished" in evaluation.refused("compare", "--run", copies[0], "--run", copies[1])
    part.unlink()
    path = copies[1] / "scores/digits.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "does not belong to the lines" in evaluation.refused(
        "compare", "--run", copies[0], "--run", copies[1]
    )
    (copies[1] / "scores/digits.summary.json").write_text("[]")
    assert "not a summary of scores" in evaluation.refused("compare", "--run", copies[0], "--run", copies[1])


def test_one_run_and_runs_without_scores_are_refused(evaluation, scored, tmp_path):
    assert "nothing to compare it with" in evaluation.refused("compare", "--run", scored[0])
    assert f"no scores in {tmp_path}" in evaluation.refused("compare", "--run", tmp_path, "--run", tmp_path)
