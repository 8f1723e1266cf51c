"""Folders that others made: nothing outside them is read, nothing in them is run, every mistake is
one line.
"""

import hashlib
import json
import os
import shutil
import subprocess

import pytest
from PIL import Image

from common.images import MAX_PIXELS
from evaluation.images import MAX_BATCH, decode
from solvers import Predictor, SolverTable, Spec, save_predictor

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


def records_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def with_hashes(evaluation, folder):
    """The folder with the sizes and hashes of its images in the manifest, as sample.py writes them."""
    records = records_of(folder)
    for record in records:
        content = (folder / record["file"]).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    evaluation.write_manifest(folder, records)
    return folder


def refused(evaluation, folder, *more) -> str:
    message = evaluation.refused("score", "--images", folder, "--metrics", "judge", "--device", "cpu", *more)
    assert not list(folder.rglob("*.summary.json"))
    return message


def refused_report(evaluation, runs, out) -> str:
    options = [part for run in runs for part in ("--run", run)]
    return evaluation.refused("report", *options, "--out", out / "report.html")


@pytest.mark.parametrize("how", ["../private.png", "absolute", "link", "a\0.png", ""])
def test_images_outside_a_folder_are_not_scored(evaluation, tmp_path, how):
    folder = evaluation.make(tmp_path / "a", range(2))
    Image.new("RGB", (32, 32)).save(tmp_path / "private.png")
    records = records_of(folder)
    if how == "link":
        (folder / "000001.png").unlink()
        (folder / "000001.png").symlink_to(tmp_path / "private.png")
    else:
        records[1]["file"] = str(tmp_path / "private.png") if how == "absolute" else how
        evaluation.write_manifest(folder, records)
    assert "not read" in refused(evaluation, folder)
    if how == "link":
        (folder / "manifest.jsonl").unlink()
        (tmp_path / "prompts.txt").write_text("a red seven\n" * 2)
        assert "not read" in refused(evaluation, folder, "--prompts", tmp_path / "prompts.txt")


@pytest.mark.parametrize("how", ["../../private.png", "link"])
def test_images_outside_a_folder_are_not_put_into_the_report(evaluation, scored, tmp_path, how):
    runs = [shutil.copytree(run, tmp_path / run.name) for run in scored]
    Image.new("RGB", (32, 32)).save(tmp_path.parent / "private.png")
    if how == "link":
        (runs[1] / "000000.png").unlink()
        (runs[1] / "000000.png").symlink_to(tmp_path.parent / "private.png")
    else:
        for metric in ("digits", "judge"):
            path = runs[1] / f"scores/{metric}.jsonl"
            path.write_text(path.read_text().replace('"000000.png"', f'"{how}"'))
    assert "not read" in refused_report(evaluation, runs, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_pipe_among_the_files_does_not_hang(evaluation, tmp_path):
    folder = evaluation.make(tmp_path / "a", range(2))
    for name in ("000001.png", "manifest.jsonl"):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        assert f"{name}: not a file" in refused(evaluation, folder)
        os.replace(folder / "kept", folder / name)
    os.mkfifo(tmp_path / "a.pkl")
    evaluation.score(folder, "--exps", tmp_path, metrics="judge")


def test_postscript_by_the_name_of_an_image_starts_no_program(evaluation, scored, tmp_path, monkeypatch):
    folder = evaluation.make(tmp_path / "a", range(2))
    runs = [shutil.copytree(run, tmp_path / run.name) for run in scored]
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)  # as PIL does for Ghostscript
    (folder / "000001.png").write_bytes(EPS)
    (runs[1] / "000000.png").write_bytes(EPS)
    assert "000001.png: not a readable image, PNG or JPEG" in refused(evaluation, folder)
    assert "000000.png: not a readable image" in refused_report(evaluation, runs, tmp_path)


def test_a_batch_has_a_bound_of_pixels(monkeypatch, tmp_path):
    limits = []

    def decode_image(content, path, limit):
        limits.append(limit)
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr("evaluation.images.decode_image", decode_image)
    decode([b""], [tmp_path])
    decode([b""] * 64, [tmp_path] * 64)
    assert limits == [MAX_PIXELS] + [MAX_BATCH // 64] * 64


def test_an_image_that_is_not_the_recorded_one_is_refused(evaluation, tmp_path):
    folder = with_hashes(evaluation, evaluation.make(tmp_path / "a", range(4)))
    evaluation.score(folder, metrics="judge")
    assert evaluation.lines(folder, "judge")[0].keys() == {
        *("file", "seed", "prompt", "score", "image", "protocol")
    }
    shutil.copyfile(folder / "000000.png", folder / "000003.png")
    message = evaluation.refused("score", "--images", folder, "--metrics", "judge")
    assert "000003.png: " in message
    assert "other than those that manifest.jsonl records" in message


def test_no_image_is_left_out_without_a_word(evaluation, tmp_path):
    """A manifest whose last line is torn, or that lists fewer images than are there."""
    folder = evaluation.make(tmp_path / "a", range(4))
    path = folder / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "manifest.jsonl, line 4: not the record of an image" in refused(evaluation, folder)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    message = refused(evaluation, folder)
    assert "lists 3 images, but not 1 that are there, such as 000003.png" in message
    (folder / "grids").mkdir()
    (folder / "000003.png").rename(folder / "grids/batch_0000.png")
    evaluation.score(folder, metrics="judge")


@pytest.mark.parametrize(
    "changes",
    [
        {"file": 5},
        {"seed": True},
        {"seed": 1e400},
        {"seed": 10**30},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"depth": "6"},
        {"depth": 10**400},
        {"evaluations": []},
        {"guidance": float("nan")},
        {"guidance_rows": {}},
        {"solver": ["euler"]},
        {"predictor": 5},
        {"sha256": 5},
        {"bytes": "12"},
        {"config": []},
        {"nodes": 3},
        {"weights": 1.5},
    ],
    ids=str,
)
def test_wrong_types_in_a_manifest(evaluation, tmp_path, changes):
    folder = evaluation.make(tmp_path / "a", range(2))
    evaluation.write_manifest(folder, [record | changes for record in records_of(folder)])
    message = refused(evaluation, folder)
    assert message.startswith(f"{folder / 'manifest.jsonl'}, line 1: {next(iter(changes))} is ")


@pytest.mark.parametrize(
    "line", [b"[" * 10**5, b"5", b"{}", b"\xff\xfe", b'{"file"', b"1" * 5000, b"null, 1"]
)
def test_lines_that_are_no_records(evaluation, tmp_path, line):
    folder = evaluation.make(tmp_path / "a", range(2))
    path = folder / "manifest.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert "line 1: not the record of an image" in refused(evaluation, folder)


@pytest.mark.parametrize(
    "key", ["metric", "count", "mean", "interval", "trained_on", "protocol", "images", "method"]
)
@pytest.mark.parametrize("value", [[], "5", {"a": 1}, 10**400, float("inf"), [1, "2"], [[1], [2]]], ids=str)
def test_wrong_types_in_a_summary(evaluation, scored, tmp_path, key, value):
    runs = [scored[0], shutil.copytree(scored[1], tmp_path / "b")]
    path = runs[1] / "scores/judge.summary.json"
    summary = json.loads(path.read_text())
    if type(summary[key]) is type(value):
        pytest.skip("of the right type")
    path.write_text(json.dumps(summary | {key: value}))
    assert str(path) in refused_report(evaluation, runs, tmp_path)


@pytest.mark.parametrize(
    "changes", [{"depth": "6"}, {"solver": 1}, {"guidance_rows": "x"}, {"predictor": {}}], ids=str
)
def test_wrong_types_of_settings_in_a_summary(evaluation, scored, tmp_path, changes):
    runs = [scored[0], shutil.copytree(scored[1], tmp_path / "b")]
    path = runs[1] / "scores/judge.summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"images": summary["images"] | changes}))
    message = refused_report(evaluation, runs, tmp_path)
    assert f"judge.summary.json, images: {next(iter(changes))} is " in message


@pytest.mark.parametrize("reward", [5, [], {}, {"name": []}, {"name": "hps", "options": 3}], ids=str)
def test_wrong_types_in_a_provenance(evaluation, tmp_path, reward):
    path = tmp_path / "exps/a.pkl"
    save_predictor(Predictor(SolverTable.uniform(2, 2), Spec(), None, {"reward": reward}), path)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = evaluation.make(tmp_path / "a", range(2), predictor=sha)
    message = refused(evaluation, folder, "--exps", tmp_path / "exps")
    assert message.startswith(f"{path}: provenance.reward is ")


def test_a_predictor_without_a_hash_is_no_predictor(evaluation, tmp_path):
    save_predictor(Predictor(SolverTable.uniform(2, 2), Spec()), tmp_path / "exps/a.pkl")
    folder = evaluation.make(tmp_path / "a", range(2), predictor="")
    evaluation.score(folder, "--exps", tmp_path / "exps", metrics="judge")
    assert evaluation.summary(folder, "judge")["trained_on"] is None


def test_names_with_markup_are_text(evaluation, scored, tmp_path):
    """In the page they are escaped, and a figure takes no dollar sign for mathematics."""
    name = "<script>alert(1)</script> $\\frac$".replace("/", "_")
    runs = [shutil.copytree(run, tmp_path / f"{name}{i}") for i, run in enumerate(scored)]
    evaluation.run("report", "--run", runs[0], "--run", runs[1], "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 1  # its own
