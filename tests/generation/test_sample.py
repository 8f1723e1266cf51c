"""sample.py as a user runs it: pairing of prompts and seeds, options, and errors of one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from backends import initial_noise
from generation.output import to_uint8
from solvers import load_predictor, save_predictor

from .command import invoke, manifest, pixels, refused

ROOT = Path(__file__).parents[2]


def test_nodes_that_are_not_those_of_their_schedule_are_reported_and_used(tmp_path, table):
    run = "--seeds 0 --prompt x --predictor_path"
    assert "recorded nodes" not in invoke(run, table, "--outdir", tmp_path / "same")
    predictor = load_predictor(table)
    other = tmp_path / "other.pkl"
    save_predictor(replace(predictor, sigmas=predictor.sigmas * torch.tensor([1, 1.01, 1, 1])), other)
    note = "the recorded nodes differ from logsnr nodes of gaussian by up to 1 %; they are used"
    assert note in invoke(run, other, "--outdir", tmp_path / "other")
    assert not np.array_equal(*(pixels(tmp_path / name)["000000/000000.png"] for name in ("same", "other")))


def test_pairing_by_seed_and_manifest(tmp_path, table):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("first\nsecond\nthird\n")
    text = invoke(
        f"--predictor_path {table} --prompt-file {prompts} --seeds 7,3,1000,5 --batch 3 --outdir {out}"
    )
    assert "serial depth 6, 9 evaluations" in text
    records = manifest(out)
    assert [(r["seed"], r["prompt"], r["file"]) for r in records] == [
        (3, "first", "000000/000003.png"),
        (5, "third", "000000/000005.png"),
        (7, "second", "000000/000007.png"),
        (1000, "second", "001000/001000.png"),
    ]
    assert set(pixels(out)) == {r["file"] for r in records}
    known = {"solver": "epd", "depth": 6, "evaluations": 9, "guidance": 2.0, "finish": "none"}
    assert all(known.items() <= r.items() for r in records)
    assert all(len(r["predictor"]) == 64 and len(r["nodes"]) == 4 for r in records)
    assert not list(out.glob("manifest.part*"))


def test_a_job_split_over_ranges_of_seeds_makes_the_same_images(tmp_path, table):
    (tmp_path / "p.txt").write_text("first\nsecond\nthird\n")
    for name, seeds in (("whole", "0-6"), ("low", "0-3"), ("high", "4-6")):
        run = f"--predictor-path {table} --prompt-file {tmp_path}/p.txt --seeds {seeds}"
        invoke(run, "--outdir", tmp_path / name)
    whole = {r["seed"]: r for r in manifest(tmp_path / "whole")}
    assert whole == {r["seed"]: r for name in ("low", "high") for r in manifest(tmp_path / name)}


def test_a_prompt_goes_before_a_file_of_prompts_with_a_note(tmp_path, table):
    out = tmp_path / "out"
    text = invoke(f"--predictor {table} --prompt-file p.txt --prompt x --seeds 0 --outdir {out}")
    assert "note: --prompt is given: --prompt-file p.txt is not read" in text
    assert [r["prompt"] for r in manifest(out)] == ["x"]


def test_images_do_not_depend_on_the_batch(tmp_path, table):
    for batch in (1, 4, 7):
        run = f"--predictor-path {table} --prompt x --seeds 0-9 --batch {batch}"
        invoke(run, "--outdir", tmp_path / str(batch))
    one, four, seven = (pixels(tmp_path / str(b)) for b in (1, 4, 7))
    assert len(one) == 10
    assert all(abs(one[k] - four[k]).max() <= 1 and abs(one[k] - seven[k]).max() <= 1 for k in one)
    assert abs(one["000000/000000.png"] - one["000000/000001.png"]).max() > 20


def test_noise_of_a_seed_depends_on_nothing_else():
    alone, together = initial_noise([5], (4, 8, 8)), initial_noise([3, 5, 9], (4, 8, 8))
    assert torch.equal(alone[0], together[1])
    assert torch.equal(alone[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))


def test_what_goes_beside_the_images(tmp_path, table):
    flat = tmp_path / "flat"
    run = f"--predictor_path {table} --prompt x --seeds 0-2 --no-subdirs --grid --return_inters True"
    invoke(run, "--outdir", flat)
    images = pixels(flat)
    assert {"000000.png", "000001.png", "000002.png", "grids/batch_0000.png"} <= set(images)
    steps = [k for k in images if k.startswith("inters/000001/")]
    assert len(steps) == 3
    assert np.array_equal(images[max(steps)], images["000001.png"])
    assert not np.array_equal(images[min(steps)], images["000001.png"])
    grid = images["grids/batch_0000.png"]
    assert any(np.array_equal(grid[:8, :8], images[f"00000{i}.png"]) for i in range(3))


def test_pixels_are_rounded():
    values = torch.tensor([0.0, 0.4999, 0.5001, 254.4, 254.6, 255.0]) / 255
    assert to_uint8(values).tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp", "unipc", "ipndm", "dpm2"])
def test_steps_match(tmp_path, table, solver):
    out = tmp_path / "out"
    run = f"--predictor_path {table} --solver {solver} --steps-match --prompt x --seeds 0"
    assert "serial depth 6" in invoke(run, "--outdir", out)
    record = manifest(out)[0]
    assert record["predictor"] is None
    assert record["guidance"] == 2.0


def test_finish_costs_one_more_evaluation(tmp_path, table):
    run = f"--predictor_path {table} --prompt x --seeds 0-3 --outdir {tmp_path}"
    assert "depth 7, 10 evaluations" in invoke(f"{run}/d --finish denoise")
    invoke(f"{run}/e --finish euler")
    invoke(f"{run}/n")
    denoise, euler, none = (pixels(tmp_path / k) for k in "den")
    assert all(np.array_equal(denoise[k], euler[k]) for k in denoise)
    assert any(not np.array_equal(denoise[k], none[k]) for k in denoise)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "digits"], ["'digits'", "'gaussian'"]),
        (["--schedule", "polynomial"], ["'polynomial'", "'logsnr'"]),
        (["--num-steps", "9"], ["9", "4"]),
        (["--steps-match"], ["--steps-match"]),
        (["--backend-config", "{"], ["--backend-config"]),
        (["--backend-config", "[1]"], ["JSON object"]),
        (["--use_fp16", "true", "--dtype", "bfloat16"], ["bfloat16"]),
        (["--solver", "heun", "--num-steps", "4", "--steps-match"], ["--steps-match"]),
        (["--seeds", "4-1"], ["4-1"]),
        (["--guidance", "nan"], ["nan"]),
        (["--guidance", "inf"], ["inf"]),
        (["--prompt", "bad\udcff"], ["not UTF-8"]),
        (["--backend-config", '{"foo": 5}'], ["foo"]),
        (["--dtype", "bfloat16", "--prompt", "x"], ["bfloat16"]),
        (["--device", "meta"], ["'meta'"]),
        (["--device", "toaster"], ["'toaster'", "cpu"]),
        (["--device", "cuda:99"], ["'cuda:99'"]),
    ],
)
def test_contradictions_name_both_values(tmp_path, table, arguments, words):
    message = refused(f"--predictor_path {table} --outdir {tmp_path}/out", *arguments)
    assert all(w in message for w in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--prompt x", "--predictor-path"),
        ("--solver euler --backend gaussian --prompt x", "--num-steps"),
        ("--solver euler --num-steps 3 --backend gaussian", "no prompts"),
        ("--predictor-path nowhere.pkl --prompt x", "nowhere.pkl"),
    ],
)
def test_missing_pieces_are_named(tmp_path, line, words):
    assert words in refused(line, "--outdir", tmp_path)


def test_use_fp16_runs_the_network_in_half_precision(tmp_path):
    run = "--backend digits --solver euler --num_steps 2 --seeds 0 --use_fp16 True"
    invoke(run, "--outdir", tmp_path)
    assert manifest(tmp_path)[0]["dtype"] == "float16"


def test_user_errors_are_one_line_and_status_2(tmp_path):
    command = [sys.executable, "sample.py", "--predictor_path", str(tmp_path / "none.pkl"), "--prompt", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: predictor ")
    assert done.stderr.count("\n") == 1


def test_a_file_in_the_way_is_named(tmp_path, table):
    """sample.py's last line of defence (common.errors.run_command) prints this exception as one line."""
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(FileExistsError, match="File exists") as error:
        invoke(f"--predictor_path {table} --prompt x --outdir {tmp_path}/out")
    assert error.value.filename == str(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "in the way"
