"""Stop requests at a chosen moment of a run, in this process and in others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from training.run_folder import StopRequest

ROOT = Path(__file__).parents[2]
SLOW = """
import sys
import time
from pathlib import Path

import torch

import {module} as launch
from {owner} import {name}
from common.errors import run_command

honest, log, calls = {name}.{method}, Path({log!r}), []


def slow(self, *arguments, **named):
    calls.append(0)
    if len(calls) > {free}:
        with log.open("a") as file:
            file.write("chunk\\n")
        time.sleep({seconds})
    return honest(self, *arguments, **named)


{name}.{method} = slow
torch.set_num_threads(1)
sys.argv = [{module!r}, *{arguments!r}]
run_command(launch.main)
"""


class StopAtCheck:
    """A run in this process that is asked to stop by the time of its n-th look for a stop request; counts all
    looks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int):
        self.number, self.checks = number, 0
        monkeypatch.setattr(StopRequest, "agreed", lambda request: self.check())

    def check(self) -> bool:
        self.checks += 1
        return self.checks >= self.number


def invoke(main, *arguments) -> str:
    """What a command printed; it must end well."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def sigterm_under_torchrun(
    tmp_path: Path, module: str, target: str, arguments: list[str], free: int, seconds: float
) -> tuple[str, float]:
    """SIGTERM to torchrun with two processes as soon as chunks become slow: what was printed, and how long it
    took to end.

    `target` is the method "module.Class.method" that does a chunk: `free` chunks of a process are quick, the
    others take `seconds`.
    """
    owner, name, method = target.rsplit(".", 2)
    log, script, output = tmp_path / "chunks", tmp_path / "slow.py", tmp_path / "output"
    settings = {
        "module": module,
        "owner": owner,
        "name": name,
        "method": method,
        "log": str(log),
        "free": free,
        "seconds": seconds,
    }
    script.write_text(SLOW.format(**settings, arguments=arguments))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    with output.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 150
        while not log.exists() or log.read_text().count("chunk") < 2:
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        process.wait(timeout=90)
        return output.read_text(), time.monotonic() - begun
    finally:
        process.kill()
