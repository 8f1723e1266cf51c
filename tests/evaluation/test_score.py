"""evaluate.py score: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import common.records as manifest
import evaluate
from common.records import exclusive
from evaluation import scoring
from rewards import load_reward

from ..forked import Forked, start

ROOT = Path(__file__).parents[2]
DIGITS_AND_CONSTANTS = ["--option", "multi.weights.digits=1", "--option", "multi.constants.digits=[0, 1]"]


def killed_after_three(*arguments: str) -> None:
    """evaluate.py that gets SIGKILL once it has recorded its third batch."""
    append, calls = manifest.append_records, []

    def append_and_die(part, records):
        append(part, records)
        calls.append(part)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    manifest.append_records = append_and_die
    evaluate.main(arguments)


def test_lines_and_summary(evaluation, scored):
    lines, summary = evaluation.lines(scored[0], "digits"), evaluation.summary(scored[0], "digits")
    pixels = [np.asarray(Image.open(scored[0] / line["file"])) for line in lines]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    scores = load_reward("digits", {}, "cpu")(images, [line["prompt"] for line in lines])
    assert [line["score"] for line in lines] == pytest.approx(scores.tolist(), abs=1e-6)
    assert [line["seed"] for line in lines] == list(range(8))
    assert (summary["count"], summary["prompts"], summary["trained_on"]) == (8, 4, False)
    assert summary["mean"] == pytest.approx(np.mean([line["score"] for line in lines]))
    by_prompt = [np.mean([lines[i]["score"], lines[i + 1]["score"]]) for i in range(0, 8, 2)]
    assert summary["standard_error"] == pytest.approx(stats.sem(by_prompt))
    assert summary["interval"] == pytest.approx(
        list(stats.t.interval(0.95, 3, np.mean(by_prompt), stats.sem(by_prompt))), rel=1e-3
    )
    assert summary["protocol"]["weights"]
    assert summary["images"]["depth"] == 6


def test_a_sum_keeps_its_heads(evaluation, tmp_path):
    evaluation.score(evaluation.make(tmp_path / "a", range(4)), *DIGITS_AND_CONSTANTS, metrics="digits,multi")
    for plain, line in zip(
        evaluation.lines(tmp_path / "a", "digits"), evaluation.lines(tmp_path / "a", "multi"), strict=True
    ):
        assert line["heads"] == {"digits": pytest.approx(plain["score"], abs=1e-6)}
        assert line["score"] == pytest.approx(min(max(plain["score"], 0), 1), abs=1e-6)
        assert "heads" not in plain
    summary = evaluation.summary(tmp_path / "a", "multi")
    assert summary["heads"]["digits"] == pytest.approx(
        evaluation.summary(tmp_path / "a", "digits")["mean"], abs=1e-6
    )


def test_scoring_twice_changes_nothing(evaluation, tmp_path, monkeypatch):
    folder = evaluation.make(tmp_path / "a")
    evaluation.score(folder, "--batch", 3, metrics="digits")
    before = evaluation.contents(folder)
    times = {p.name: p.stat().st_mtime_ns for p in (folder / "scores").glob("digits*")}
    monkeypatch.setattr(scoring, "decode", None)  # no image is looked at again
    evaluation.score(folder, "--batch", 5, metrics="digits")
    assert evaluation.contents(folder) == before
    assert times == {p.name: p.stat().st_mtime_ns for p in (folder / "scores").glob("digits*")}


def test_only_what_changed_is_scored_again(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a")
    evaluation.score(folder, metrics="digits")
    path = folder / "scores/digits.jsonl"
    path.write_text(path.read_text().replace('"score": ', '"score": 7.5, "first": ', 1))
    before = evaluation.lines(folder, "digits")
    shutil.copyfile(folder / "000001.png", folder / "000004.png")
    evaluation.score(folder, metrics="digits")
    after = evaluation.lines(folder, "digits")
    assert [i for i in range(8) if before[i] != after[i]] == [4]
    assert after[4]["image"] == after[1]["image"]
    assert evaluation.summary(folder, "digits")["mean"] == pytest.approx(
        np.mean([line["score"] for line in after])
    )


def test_another_protocol_is_refused(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a", range(4))
    evaluation.score(folder, *DIGITS_AND_CONSTANTS, metrics="multi")
    other = [*DIGITS_AND_CONSTANTS[:-1], "multi.constants.digits=[0, 2]"]
    message = evaluation.refused("score", "--images", folder, "--metrics", "multi", *other)
    assert str(folder / "scores/multi.jsonl") in message
    assert "remove the file" in message
    (folder / "scores/multi.jsonl").unlink()
    evaluation.score(folder, *other, metrics="multi")


def test_killed_half_way_and_run_again(evaluation, tmp_path):
    """SIGKILL after three batches of two, and a line torn: the bytes of a run that nothing disturbed."""
    whole, killed = evaluation.make(tmp_path / "whole"), evaluation.make(tmp_path / "killed")
    evaluation.score(whole, "--batch", 2, metrics="digits")
    arguments = ("score", "--images", str(killed), "--metrics", "digits", "--batch", "2", "--device", "cpu")
    done = Forked(killed_after_three, *arguments).wait()
    assert done.returncode == -signal.SIGKILL
    part = killed / "scores/digits.part00000.jsonl"
    assert len(part.read_bytes().splitlines()) == 6
    assert not (killed / "scores/digits.summary.json").exists()
    with part.open("ab") as file:
        file.write(b'{"file": "000006.p')
    evaluation.score(killed, "--batch", 2, metrics="digits")
    assert evaluation.contents(killed) == evaluation.contents(whole)


def test_two_processes_write_what_one_does(evaluation, tmp_path):
    one, two = evaluation.make(tmp_path / "one"), evaluation.make(tmp_path / "two")
    evaluation.score(one, "--batch", 3)
    arguments = (
        "score",
        "--images",
        str(two),
        "--metrics",
        "digits,judge",
        "--batch",
        "3",
        "--device",
        "cpu",
    )
    done = start("evaluate", *arguments, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert evaluation.contents(two) == evaluation.contents(one)


def test_prompts_pair_by_sorted_name(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a", range(5))
    (folder / "manifest.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("a red seven\na blue two\n" * 2 + "a red seven\n")
    evaluation.score(folder, "--prompts", tmp_path / "prompts.txt", metrics="judge")
    lines = evaluation.lines(folder, "judge")
    assert [line["prompt"] for line in lines] == ["a red seven", "a blue two"] * 2 + ["a red seven"]
    assert [(line["file"], line["seed"]) for line in lines] == [(f"{i:06d}.png", i) for i in range(5)]
    assert evaluation.summary(folder, "judge")["trained_on"] is None


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_prompts_as_images_are_needed(evaluation, tmp_path, count):
    folder = evaluation.make(tmp_path / "a", range(4))
    (folder / "manifest.jsonl").unlink()
    (tmp_path / "prompts.txt").write_text("a red seven\n" * count)
    message = refused_folder(evaluation, folder, "--prompts", tmp_path / "prompts.txt")
    assert f"--prompts {tmp_path / 'prompts.txt'}: {count} prompts for the 4 images in {folder}" in message
    assert not (folder / "scores").exists()


def test_every_metric_is_checked_before_any_loads(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a", range(2))
    message = evaluation.refused(
        "score",
        "--images",
        folder,
        "--metrics",
        "digits,hps",
        "--option",
        f"hps.weights_path={tmp_path / 'none.pt'}",
    )
    assert "none.pt" in message
    assert not (folder / "scores").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metrics", "digit"], ["'digit' is no metric", "digits"]),
        (["--metrics", ""], ["--metrics is empty"]),
        (["--metrics", "digits,digits"], ["digits is there twice"]),
        (["--metrics", "digits", "--option", "digits"], ["metric.key=value"]),
        (["--metrics", "digits", "--option", "judge.a=1"], ["'judge' is not among --metrics digits"]),
        (["--metrics", "digits", "--option", "digits.colour=1"], ["unknown option 'colour'"]),
        (
            ["--metrics", "multi", "--option", "multi.weights=1", "--option", "multi.weights.hps=1"],
            ["'weights' has a value already"],
        ),
        (
            ["--metrics", "multi", "--option", "multi.weights.hps=1", "--option", "multi.weights.hps=2"],
            ["is there twice"],
        ),
        (
            ["--metrics", "digits", "--prompts", "prompts.txt"],
            ["manifest.jsonl says the prompt of each image"],
        ),
        (["--metrics", "digits", "--exps", "nowhere"], ["--exps nowhere", "not a folder"]),
    ],
)
def test_refused_options(evaluation, scored, arguments, words):
    message = evaluation.refused("score", "--images", scored[0], *arguments)
    assert all(word in message for word in words)


def refused_folder(evaluation, folder: Path, *more: object) -> str:
    return evaluation.refused("score", "--images", folder, "--metrics", "digits", *more)


def test_refused_folders(evaluation, tmp_path):
    assert "not a folder" in refused_folder(evaluation, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "--prompts FILE" in refused_folder(evaluation, tmp_path / "empty")
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    assert "holds no image" in refused_folder(
        evaluation, tmp_path / "empty", "--prompts", tmp_path / "prompts.txt"
    )
    folder = evaluation.make(tmp_path / "a", range(4))
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for changed, word in (
        ({"solver": "euler"}, "images with solver 'dpmpp' and 'euler'"),
        ({"seed": "2"}, "seed is '2', expected int"),
        ({"file": "000001.png"}, "000001.png is there twice"),
    ):
        evaluation.write_manifest(folder, [*records[:2], records[2] | changed])
        assert word in refused_folder(evaluation, folder)
    evaluation.write_manifest(folder, records)
    (folder / "manifest.part00000.jsonl").touch()
    assert "sampling was not finished" in refused_folder(evaluation, folder)


def test_refused_images(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a", range(4))
    Image.new("RGB", (16, 32)).save(folder / "000001.png")
    message = refused_folder(evaluation, folder)
    assert "000001.png of 16 x 32" in message
    assert "--batch 1" in message
    assert "judge: images of 16 x 32 pixels" in evaluation.refused(
        "score", "--images", folder, "--metrics", "judge", "--batch", 1
    )
    (folder / "000002.png").write_bytes(b"\x89PNG\r\n")
    assert "000002.png: not a readable image" in refused_folder(evaluation, folder, "--batch", 1)
    (folder / "000000.png").unlink()
    assert "000000.png is in manifest.jsonl but not there" in refused_folder(evaluation, folder)


def test_damaged_scores_and_a_second_run_are_refused(evaluation, scored, tmp_path):
    folder = shutil.copytree(scored[0], tmp_path / "a")
    path = folder / "scores/digits.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"score": ', '"score": NaN, "was": ', 1))
    assert "expected a finite number" in refused_folder(evaluation, folder)
    path.write_text("{}\n" + text)
    assert "digits.jsonl, line 1" in refused_folder(evaluation, folder)
    with exclusive(folder / "scores"):
        assert "another run is writing here (process" in refused_folder(evaluation, folder)


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    done = start("evaluate", "score", "--images", tmp_path, "--metrics", "digits").wait()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --images {tmp_path}: no manifest.jsonl")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
