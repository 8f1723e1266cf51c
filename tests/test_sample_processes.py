"""sample.py killed and run again, and shared out over processes: the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
RUN = ["--predictor_path", "exps/digits", "--seeds", "0-63"]


def start(*arguments: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, "sample.py", *RUN, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 0, output
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_once_begun(process: subprocess.Popen, folder: Path) -> None:
    """SIGKILL as soon as some images are recorded, and before all are."""
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in folder.glob("manifest.part*.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start("--outdir", folder, "--batch", 4))
    return folder


def test_killed_and_run_again_gives_identical_files(tmp_path, undisturbed):
    process = start("--outdir", tmp_path, "--batch", 4)
    kill_once_begun(process, tmp_path)
    done = len(list(tmp_path.rglob("*.png")))
    assert 0 < done < 64
    finish(start("--outdir", tmp_path, "--batch", 4))
    assert contents(tmp_path) == contents(undisturbed)
    assert len(list(tmp_path.rglob("*.png"))) == 64


def test_two_processes_give_the_same_images(tmp_path, undisturbed):
    """The same batches on two ranks: byte for byte; another batch size: at most one grey level."""
    finish(start("--outdir", tmp_path / "two", "--batch", 4, processes=2))
    assert contents(tmp_path / "two") == contents(undisturbed)
    finish(start("--outdir", tmp_path / "other", "--batch", 24))
    for path in sorted(undisturbed.rglob("*.png")):
        a, b = (np.asarray(Image.open(p)).astype(int) for p in (path, tmp_path / "other" / path.relative_to(undisturbed)))
        assert abs(a - b).max() <= 1
