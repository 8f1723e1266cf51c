"""sample.py killed and run again, and with its work divided over processes: the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from backends import load_backend
from common.distributed import Ranks
from generation.generate import Sampler, divide_points
from solvers import Spec, load_predictor

from ..forked import start
from .command import contents, invoke, pixels

ROOT = Path(__file__).parents[2]
RUN = f"--predictor_path {ROOT}/exps/digits --seeds 0-63 --device cpu"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    invoke(RUN, "--outdir", folder, "--batch", 4)
    return folder


def largest_difference(folder: Path, other: Path) -> int:
    """Of the images of two folders, in grey levels."""
    a, b = pixels(folder), pixels(other)
    assert a.keys() == b.keys()
    return max(int(np.abs(a[name] - b[name]).max()) for name in a)


def test_killed_and_run_again_gives_identical_files(tmp_path, undisturbed):
    process = start("sample", *RUN.split(), "--outdir", tmp_path, "--batch", 4)
    process.signal_when(lambda: any(p.stat().st_size for p in tmp_path.glob("manifest.part*.jsonl")))
    assert 0 < len(contents(tmp_path, "*.png")) < 64
    invoke(RUN, "--outdir", tmp_path, "--batch", 4)
    assert contents(tmp_path) == contents(undisturbed)
    assert len(contents(tmp_path, "*.png")) == 64


def test_two_processes_give_the_same_images(tmp_path, undisturbed):
    """The same batches on two ranks: byte for byte; another batch size: at most one grey level."""
    done = start("sample", *RUN.split(), "--outdir", tmp_path / "two", "--batch", 4, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(undisturbed)
    invoke(RUN, "--outdir", tmp_path / "other", "--batch", 24)
    assert largest_difference(undisturbed, tmp_path / "other") <= 1


def test_points_and_cfg_branches_over_processes_give_the_same_images(tmp_path, undisturbed):
    options = ("--outdir", tmp_path, "--batch", 32, "--parallel", "points-cfg")
    done = start("sample", *RUN.split(), *options, ranks=3).wait()
    assert done.returncode == 0, done.stderr
    assert largest_difference(undisturbed, tmp_path) <= 1
    assert done.stdout.count("64 images in") == 1
    assert "note: --parallel points-cfg gives work to 2 of 3 processes: start 2" in done.stderr


def rank_pids(launcher: subprocess.Popen) -> dict[str, int]:
    """The process ids of a torchrun's ranks, by rank."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher.pid:
                variables = (folder / "environ").read_text().split("\0")
                pids[dict(v.split("=", 1) for v in variables if "=" in v)["RANK"]] = int(folder.name)
        except (OSError, KeyError):
            continue  # it ended while we looked
    return pids


ENDED = "error: another process of this run has ended"


def check_resumed(run: str, out: Path, undisturbed: Path) -> None:
    """What a run that lost a process completed is kept, and the same command makes the rest."""
    done = contents(out, "*.png")
    assert 0 < len(done) < 1000
    invoke(run, "--outdir", out)
    invoke(run, "--outdir", undisturbed)
    assert done.items() <= contents(out, "*.png").items()
    assert largest_difference(undisturbed, out) <= 1


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_process_that_dies_ends_the_run_in_a_line_and_it_goes_on_later(tmp_path, table):
    """The others, started by torchrun, wait for it in an all-gather; nothing hangs, and one reports it."""
    out, run = tmp_path / "out", f"--predictor {table} --seeds 0-999 --prompt x --device cpu --batch 4"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone"]
    options = [*run.split(), "--parallel", "points-cfg", "--outdir", str(out)]
    process = subprocess.Popen(
        [sys.executable, *launcher, "sample.py", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 120
    while not any(out.rglob("*.png")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(rank_pids(process)["0"], signal.SIGKILL)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode != 0
    assert output.count(ENDED) == 1
    check_resumed(run, out, tmp_path / "undisturbed")


def test_it_ends_the_same_way_when_the_last_process_dies(tmp_path, table):
    out, run = tmp_path / "out", f"--predictor {table} --seeds 0-999 --prompt x --device cpu --batch 4"
    process = start("sample", *run.split(), "--parallel", "points", "--outdir", out, ranks=2)
    ended = process.signal_when(lambda: any(out.rglob("*.png")), rank=1)
    assert ended.returncode != 0
    assert ended.stderr.count(ENDED) == 1
    check_resumed(run, out, tmp_path / "undisturbed")


def gaussian_sampler(table: Path, guidance: float) -> Sampler:
    """K = 2 points, and two branches where guidance is not 1."""
    predictor, gaussian = load_predictor(table), load_backend(Spec(backend="gaussian"), "cpu")
    return Sampler(gaussian, predictor.solver(), "epd", gaussian.sigmas(predictor.spec), guidance)


@pytest.mark.parametrize(
    ("parallel", "guidance", "world", "useful"),
    [
        ("points", 2.0, 3, 2),
        ("points-cfg", 2.0, 5, 4),
        ("points-cfg", 1.0, 4, 2),
        ("points-cfg", 2.0, 3, 2),
        ("points-cfg", 2.0, 4, 0),
    ],
)
def test_processes_without_work_are_reported(table, capsys, parallel, guidance, world, useful):
    ranks = Ranks(0, world, torch.device("cpu"))
    evaluator = divide_points(gaussian_sampler(table, guidance), parallel, ranks).evaluator
    assert evaluator.ranks is ranks
    assert evaluator.branches == (parallel == "points-cfg" and guidance != 1)
    note = f"note: --parallel {parallel} gives work to {useful} of {world} processes: start {useful}\n"
    assert capsys.readouterr().err == (note if useful else "")


def test_one_process_divides_nothing(table, capsys):
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert divide_points(gaussian_sampler(table, 2.0), "points-cfg", ranks).evaluator.ranks is None
    note = "note: --parallel points-cfg has one process: start up to 4 with torchrun\n"
    assert capsys.readouterr().err == note
