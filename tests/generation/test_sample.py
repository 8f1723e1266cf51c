"""sample.py as a user runs it: options, pairing, manifest, and errors of one line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import sample
from backends import initial_noise, load_backend
from common.prompts import read_prompts
from common.records import exclusive
from solvers import SolverTable, Spec, UserError, load_predictor, logsnr, save_predictor
from solvers.predictor import Predictor

ROOT = Path(__file__).parent.parent


def invoke(*arguments: str) -> str:
    """Run the command line in this process; errors come out as they are."""
    result = CliRunner().invoke(sample.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: str) -> str:
    """The one line with which the command line refuses its arguments."""
    with pytest.raises(UserError) as error:
        invoke(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """Every image below a folder by relative name."""
    return {
        str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int)
        for p in sorted(folder.rglob("*.png"))
    }


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture
def table(tmp_path) -> Path:
    """A predictor for the exact Gaussian backbone."""
    path = tmp_path / "table.pkl"
    spec = Spec(
        backend="gaussian",
        num_steps=4,
        num_points=2,
        schedule_type="logsnr",
        guidance_rate=2.0,
        sigma_min=0.05,
        sigma_max=10.0,
    )
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, logsnr(4, 0.05, 10.0)), path)
    return path


def test_nodes_that_are_not_those_of_their_schedule_are_reported_and_used(tmp_path, table):
    arguments = ["--seeds", "0", "--prompt", "x", "--predictor_path"]
    assert "recorded nodes" not in invoke(*arguments, table, "--outdir", tmp_path / "same")
    predictor = load_predictor(table)
    other = tmp_path / "other.pkl"
    save_predictor(replace(predictor, sigmas=predictor.sigmas * torch.tensor([1, 1.01, 1, 1])), other)
    assert "the recorded nodes differ from logsnr nodes of gaussian by up to 1 %; they are used" in invoke(
        *arguments, other, "--outdir", tmp_path / "other"
    )
    assert not np.array_equal(*(pixels(tmp_path / name)["000000/000000.png"] for name in ("same", "other")))


def test_seeds():
    assert sample.parse_seeds("0,3,10-12") == [0, 3, 10, 11, 12]
    for bad, word in (
        ("a", "'a'"),
        ("5-3", "reversed"),
        ("1,1", "twice"),
        ("", "neither"),
        ("-3", "neither"),
        ("²", "neither"),
        (str(2**32), "too large"),
    ):
        with pytest.raises(UserError, match=word):
            sample.parse_seeds(bad)


def test_prompts_from_files(tmp_path):
    (tmp_path / "a.csv").write_text('id,caption,text\n1,"no, this","yes, this"\n2,no,second\n')
    (tmp_path / "c.csv").write_text('text,other\n"two\nlines",1\n,2\nlast,3,4,5\n')
    (tmp_path / "b.txt").write_text("\ufeffone\n\n  two \n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert read_prompts(tmp_path / "a.csv", "--prompt-file") == ["yes, this", "second"]
    assert read_prompts(tmp_path / "b.txt", "--prompt-file") == ["one", "two"]
    assert read_prompts(tmp_path / "c.csv", "--prompt-file") == ["two\nlines", "last"]
    for name in ("empty.txt", "binary.txt", "missing.txt"):
        with pytest.raises(UserError, match=name):
            read_prompts(tmp_path / name, "--prompt-file")


def test_pairing_by_seed_and_manifest(tmp_path, table):
    prompts = tmp_path / "p.txt"
    prompts.write_text("first\nsecond\nthird\n")
    out = tmp_path / "out"
    text = invoke(
        "--predictor_path",
        table,
        "--prompt-file",
        prompts,
        "--seeds",
        "7,3,1000,5",
        "--batch",
        3,
        "--outdir",
        out,
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
        invoke(
            "--predictor-path",
            table,
            "--prompt-file",
            tmp_path / "p.txt",
            "--seeds",
            seeds,
            "--outdir",
            tmp_path / name,
        )
    whole = {r["seed"]: r for r in manifest(tmp_path / "whole")}
    assert whole == {r["seed"]: r for name in ("low", "high") for r in manifest(tmp_path / name)}


def test_a_prompt_goes_before_a_file_of_prompts_with_a_note(tmp_path, table):
    text = invoke(
        "--predictor",
        table,
        "--prompt-file",
        "p.txt",
        "--prompt",
        "x",
        "--seeds",
        "0",
        "--outdir",
        tmp_path / "out",
    )
    assert "note: --prompt is given: --prompt-file p.txt is not read" in text
    assert [r["prompt"] for r in manifest(tmp_path / "out")] == ["x"]


def test_images_do_not_depend_on_the_batch(tmp_path, table):
    for batch in (1, 4, 7):
        invoke(
            "--predictor-path",
            table,
            "--prompt",
            "x",
            "--seeds",
            "0-9",
            "--batch",
            batch,
            "--outdir",
            tmp_path / str(batch),
        )
    one, four, seven = (pixels(tmp_path / str(b)) for b in (1, 4, 7))
    assert len(one) == 10
    assert all(abs(one[k] - four[k]).max() <= 1 and abs(one[k] - seven[k]).max() <= 1 for k in one)
    assert abs(one["000000/000000.png"] - one["000000/000001.png"]).max() > 20


def test_noise_of_a_seed_depends_on_nothing_else():
    alone, together = initial_noise([5], (4, 8, 8)), initial_noise([3, 5, 9], (4, 8, 8))
    assert torch.equal(alone[0], together[1])
    assert torch.equal(alone[0], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)))


def test_second_run_skips_and_mends(tmp_path, table):
    run = (
        "--predictor_path",
        table,
        "--prompt",
        "x",
        "--seeds",
        "0-5",
        "--batch",
        2,
        "--outdir",
        tmp_path / "out",
    )
    invoke(*run)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted((tmp_path / "out").rglob("*.png"))}
    gone = tmp_path / "out/000000/000003.png"
    gone.unlink()
    invoke(*run)
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted((tmp_path / "out").rglob("*.png"))}
    assert {p: v[1] for p, v in before.items()} == {p: v[1] for p, v in after.items()}
    made_again = {p.stem for p in before if before[p][0] != after[p][0]}
    assert made_again == {"000002", "000003"}  # the whole batch of the missing one


def test_torn_manifest_line_is_made_again(tmp_path, table):
    run = (
        "--predictor_path",
        table,
        "--prompt",
        "x",
        "--seeds",
        "0-3",
        "--batch",
        2,
        "--outdir",
        tmp_path / "out",
    )
    invoke(*run)
    path = tmp_path / "out/manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    invoke(*run)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"{", b"[", 1))
    assert "line 1" in refused(*run)


def test_other_settings_are_refused_for_the_same_folder(tmp_path, table):
    out = ("--outdir", tmp_path / "out", "--seeds", "0-1")
    invoke("--predictor_path", table, "--prompt", "x", *out)
    assert "choose another --outdir" in refused(
        "--predictor_path", table, "--prompt", "x", "--guidance", 3, *out
    )
    assert "choose another --outdir" in refused("--predictor_path", table, "--prompt", "y", *out)
    assert "choose another --outdir" in refused(
        "--predictor_path", table, "--prompt", "y", "--seeds", "5,1", *out[:2]
    )
    assert len(manifest(tmp_path / "out")) == 2


def test_options_that_change_images_are_settings(tmp_path):
    run = ("--backend", "digits", "--solver", "euler", "--num-steps", 2, "--seeds", "0", "--outdir", tmp_path)
    invoke(*run)
    assert "config" in refused(*run, "--backend-config", '{"negative_prompt": "a bold red seven"}')


def test_what_is_missing_beside_the_images_is_made(tmp_path, table):
    run = ("--predictor_path", table, "--prompt", "x", "--seeds", "0-2", "--outdir", tmp_path / "out")
    invoke(*run)
    assert not (tmp_path / "out/grids").exists()
    invoke(*run, "--grid", "--return-inters")
    assert (tmp_path / "out/grids/batch_0000.png").exists()
    assert len(list((tmp_path / "out/inters").rglob("*.png"))) == 9


def test_one_run_at_a_time_in_a_folder(tmp_path, table):
    with exclusive(tmp_path):
        message = refused("--predictor_path", table, "--prompt", "x", "--seeds", "0", "--outdir", tmp_path)
    assert "another run" in message
    invoke("--predictor_path", table, "--prompt", "x", "--seeds", "0", "--outdir", tmp_path)


@pytest.mark.parametrize("torn", [b'{"file": "x", "prompt": "s\xc3', b'{"file', b"5"])
def test_a_part_torn_anywhere_is_left_out(tmp_path, table, torn):
    (tmp_path / "manifest.part00000.jsonl").write_bytes(torn)
    run = ("--predictor_path", table, "--prompt", "sé", "--seeds", "0", "--outdir", tmp_path)
    if torn == b"5":
        assert "line 1" in refused(*run)
    else:
        invoke(*run)
        assert [r["prompt"] for r in manifest(tmp_path)] == ["sé"]


def test_what_goes_beside_the_images(tmp_path, table):
    flat = tmp_path / "flat"
    run = (
        "--predictor_path",
        table,
        "--prompt",
        "x",
        "--seeds",
        "0-2",
        "--no-subdirs",
        "--grid",
        "--return_inters",
        "True",
    )
    invoke(*run, "--outdir", flat)
    found = pixels(flat)
    assert {"000000.png", "000001.png", "000002.png", "grids/batch_0000.png"} <= set(found)
    steps = [k for k in found if k.startswith("inters/000001/")]
    assert len(steps) == 3
    assert np.array_equal(found[max(steps)], found["000001.png"])
    assert not np.array_equal(found[min(steps)], found["000001.png"])
    grid = found["grids/batch_0000.png"]
    assert any(np.array_equal(grid[:8, :8], found[f"00000{i}.png"]) for i in range(3))


def test_pixels_are_rounded(tmp_path):
    from generation.generate import to_uint8

    values = torch.tensor([0.0, 0.4999, 0.5001, 254.4, 254.6, 255.0]) / 255
    assert to_uint8(values).tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize(
    ("solver", "depth"), [("euler", 6), ("heun", 6), ("dpmpp", 6), ("unipc", 6), ("ipndm", 6), ("dpm2", 6)]
)
def test_steps_match(tmp_path, table, solver, depth):
    out = tmp_path / "out"
    text = invoke(
        "--predictor_path",
        table,
        "--solver",
        solver,
        "--steps-match",
        "--prompt",
        "x",
        "--seeds",
        "0",
        "--outdir",
        out,
    )
    assert f"serial depth {depth}" in text
    record = manifest(out)[0]
    assert record["predictor"] is None
    assert record["guidance"] == 2.0


def test_finish_costs_one_more_evaluation(tmp_path, table):
    run = ("--predictor_path", table, "--prompt", "x", "--seeds", "0-3")
    assert "depth 7, 10 evaluations" in invoke(*run, "--finish", "denoise", "--outdir", tmp_path / "d")
    invoke(*run, "--finish", "euler", "--outdir", tmp_path / "e")
    invoke(*run, "--outdir", tmp_path / "n")
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
    message = refused("--predictor_path", table, "--outdir", tmp_path / "out", *arguments)
    assert all(w in message for w in words)
    assert not (tmp_path / "out").exists()


def test_missing_pieces_are_named(tmp_path):
    assert "--predictor-path" in refused("--prompt", "x")
    assert "--num-steps" in refused("--solver", "euler", "--backend", "gaussian", "--prompt", "x")
    assert "no prompts" in refused(
        "--solver", "euler", "--num-steps", 3, "--backend", "gaussian", "--outdir", tmp_path
    )
    assert "nowhere.pkl" in refused("--predictor-path", "nowhere.pkl", "--prompt", "x")


def test_use_fp16_runs_the_network_in_half_precision(tmp_path):
    out = tmp_path / "out"
    invoke(
        "--backend",
        "digits",
        "--solver",
        "euler",
        "--num_steps",
        2,
        "--seeds",
        "0",
        "--use_fp16",
        "True",
        "--outdir",
        out,
    )
    assert manifest(out)[0]["dtype"] == "float16"


def test_user_errors_are_one_line_and_status_2(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        "--predictor_path",
        str(tmp_path / "none.pkl"),
        "--prompt",
        "x",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: predictor ")
    assert done.stderr.count("\n") == 1


def test_a_file_in_the_way_is_named(tmp_path, table):
    (tmp_path / "out").write_text("in the way")
    command = [
        sys.executable,
        "sample.py",
        "--predictor_path",
        str(table),
        "--prompt",
        "x",
        "--outdir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'out'}: File exists"
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.parametrize(
    "parallel, guidance, world, useful",
    [
        ("points", 2.0, 3, 2),
        ("points-cfg", 2.0, 5, 4),
        ("points-cfg", 1.0, 4, 2),
        ("points-cfg", 2.0, 3, 2),
        ("points-cfg", 2.0, 4, 0),
    ],
)
def test_processes_without_work_are_told(table, capsys, parallel, guidance, world, useful):
    """K = 2 points, and two halves where guidance has them."""
    predictor, gaussian = load_predictor(table), load_backend(Spec(backend="gaussian"), "cpu")
    sampler = sample.Sampler(gaussian, predictor.solver(), "epd", gaussian.sigmas(predictor.spec), guidance)
    shared = sample.share_points(sampler, parallel, sample.Ranks(0, world, torch.device("cpu")))
    assert (shared.points.ranks.world, shared.points.branches) == (
        world,
        parallel == "points-cfg" and guidance != 1,
    )
    told = (
        f"note: --parallel {parallel} gives work to {useful} of {world} processes: start {useful}\n"
        if useful
        else ""
    )
    assert capsys.readouterr().err == told


def test_one_process_shares_nothing_out(table, capsys):
    predictor, gaussian = load_predictor(table), load_backend(Spec(backend="gaussian"), "cpu")
    sampler = sample.Sampler(gaussian, predictor.solver(), "epd", gaussian.sigmas(predictor.spec), 2.0)
    assert (
        sample.share_points(sampler, "points-cfg", sample.Ranks(0, 1, torch.device("cpu"))).points.ranks
        is None
    )
    assert (
        capsys.readouterr().err
        == "note: --parallel points-cfg has one process: start up to 4 with torchrun\n"
    )
