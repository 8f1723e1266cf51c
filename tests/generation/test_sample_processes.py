"""sample.py killed and run again, and shared out over processes: the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import sample

from .forked import start

ROOT = Path(__file__).parent.parent
RUN = ["--predictor_path", str(ROOT / "exps" / "digits"), "--seeds", "0-63", "--device", "cpu"]


def torchrun(processes: int, *arguments: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [sys.executable, *launcher, "sample.py", *RUN, *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_here(*arguments) -> None:
    """The same command in this process."""
    result = CliRunner().invoke(sample.main, [*RUN, *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here("--outdir", folder, "--batch", 4)
    return folder


def test_killed_and_run_again_gives_identical_files(tmp_path, undisturbed):
    process = start("sample", *RUN, "--outdir", tmp_path, "--batch", 4)
    process.signal_when(lambda: any(p.stat().st_size for p in tmp_path.glob("manifest.part*.jsonl")))
    done = len(list(tmp_path.rglob("*.png")))
    assert 0 < done < 64
    run_here("--outdir", tmp_path, "--batch", 4)
    assert contents(tmp_path) == contents(undisturbed)
    assert len(list(tmp_path.rglob("*.png"))) == 64


def test_two_processes_give_the_same_images(tmp_path, undisturbed):
    """The same batches on two ranks: byte for byte; another batch size: at most one grey level."""
    done = start("sample", *RUN, "--outdir", tmp_path / "two", "--batch", 4, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(undisturbed)
    run_here("--outdir", tmp_path / "other", "--batch", 24)
    assert off_by(undisturbed, tmp_path / "other") <= 1


def children(process: subprocess.Popen) -> dict[str, int]:
    """The process ids of a torchrun's ranks, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = (
                int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if folder.name.isdigit()
                else 0
            )
            if parent == process.pid:
                settings = dict(
                    part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part
                )
                found[settings["RANK"]] = int(folder.name)
        except (OSError, KeyError):
            continue  # it ended while we looked
    return found


def off_by(folder: Path, other: Path) -> int:
    """The largest difference of the images of two folders, in grey levels."""
    pairs = [(p, other / p.relative_to(folder)) for p in sorted(folder.rglob("*.png"))]
    assert pairs
    return max(
        abs(np.asarray(Image.open(a)).astype(int) - np.asarray(Image.open(b)).astype(int)).max()
        for a, b in pairs
    )


def test_points_and_halves_of_guidance_over_processes_give_the_same_images(tmp_path, undisturbed):
    done = start(
        "sample", *RUN, "--outdir", tmp_path, "--batch", 32, "--parallel", "points-cfg", ranks=3
    ).wait()
    assert done.returncode == 0, done.stderr
    assert off_by(undisturbed, tmp_path) <= 1
    assert done.stdout.count("64 images in") == 1
    assert "note: --parallel points-cfg gives work to 2 of 3 processes: start 2" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_a_process_that_dies_ends_the_run_in_a_line_and_it_goes_on_later(tmp_path, undisturbed):
    """Whichever it is: the others wait for it in an all-gather; nothing hangs, one tells, and what is
    complete is kept.
    """
    arguments, done = ["--outdir", tmp_path, "--batch", 4, "--parallel", "points"], {}
    for rank, processes in (("1", 2), ("0", 3)):
        process = torchrun(processes, *arguments)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("*.png"))) <= len(done):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(children(process)[rank], signal.SIGKILL)
        output = process.communicate(timeout=60)[0].decode()
        assert process.returncode != 0
        assert output.count("error: another process of this run has ended") == 1
        before, done = (
            done,
            {name: content for name, content in contents(tmp_path).items() if name.endswith(".png")},
        )
        assert len(before) < len(done) < 64
        assert before.items() <= done.items()
    finished = start("sample", *RUN, *arguments, ranks=2).wait()
    assert finished.returncode == 0, finished.stderr
    whole = contents(tmp_path)
    assert len([name for name in whole if name.endswith(".png")]) == 64
    assert done.items() <= whole.items()
    assert off_by(undisturbed, tmp_path) <= 1
