"""Python processes that start at once: forks of one that has imported the libraries, where `python -m` takes
seconds to import them.

For tests of what a process computes, or leaves behind when it is killed, and of what several compute as ranks
of a group. Tests of how ranks are started and of what is reported when one dies use torchrun itself.
"""

import contextlib
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["backends.ldm", "backends.sd3", "backends.flux"])
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Forked:
    """A function in one process, or in each of a group of ranks with the variables that torchrun sets; each
    leads a session of its own.
    """

    def __init__(
        self,
        function: Callable,
        *arguments: object,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        cwd=ROOT,
    ):
        with contextlib.chdir(ROOT), patch.dict(os.environ, SETTINGS):
            multiprocessing.forkserver.ensure_running()
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        for variables in group(ranks) if ranks > 1 else [{}]:
            variables = dict(os.environ) | SETTINGS | variables | (environment or {})
            process = CONTEXT.Process(
                target=run, args=(self.folder.name, variables, cwd, function, arguments), daemon=True
            )
            process.start()
            self.processes.append(process)
        self.pid = self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """That of the first rank, negative for a signal; None while it runs."""
        return self.processes[0].exitcode

    def wait(self, timeout: float = 100) -> subprocess.CompletedProcess:
        """How it ended and what it printed, once all that it started has ended too; ranks whose peer failed
        are ended.
        """
        deadline, failed = time.monotonic() + timeout, 0
        try:
            while left := {p.sentinel: p for p in self.processes if p.exitcode is None}:
                multiprocessing.connection.wait(left, deadline - time.monotonic())
                assert time.monotonic() < deadline, (
                    f"still running after {timeout} s: {self.printed('stderr')}"
                )
                failed = failed or next((p.exitcode for p in self.processes if p.exitcode), 0)
                for process in left.values() if failed else ():
                    process.terminate()
                    deadline = min(deadline, time.monotonic() + 30)
        finally:
            self.end()
        failed = failed or next((p.exitcode for p in self.processes if p.exitcode), 0)
        return subprocess.CompletedProcess([], failed, self.printed("stdout"), self.printed("stderr"))

    def end(self) -> None:
        """Kill whatever is left of it."""
        for process in self.processes:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
            wait_for_group(process.pid)

    def signal_when(
        self, done: Callable[[], bool], number: int = signal.SIGKILL, alone: bool = False, rank: int = 0
    ) -> subprocess.CompletedProcess:
        """End a rank by a signal, `alone` or with all that it started, once something is done and before it
        ends by itself.
        """
        deadline = time.monotonic() + 100
        while not (ready := done()) and self.returncode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if not ready or self.returncode is not None:
            self.end()
            raise AssertionError(f"it ended by itself, or took too long: {self.printed('stderr')}")
        (os.kill if alone else os.killpg)(self.processes[rank].pid, number)
        return self.wait()

    def printed(self, name: str) -> str:
        """All that went to a standard stream so far."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""


def wait_for_group(leader: int) -> None:
    """Until the last process of a group is gone, or only waits for a parent that never asks."""
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(leader, 0)
            time.sleep(0.01)


def start(module: str, *arguments: object, **settings) -> Forked:
    """What `python -m module arguments` does, or torchrun with so many `ranks`."""
    return Forked(run_module, module, *map(str, arguments), **settings)


def group(ranks: int) -> list[dict[str, str]]:
    """The variables of each rank of a new group on this machine."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True).port  # a free one
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run(folder: str, environment: dict[str, str], cwd: Path, function: Callable, arguments: tuple) -> None:
    """One of the processes."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    function(*arguments)


def run_module(module: str, *arguments: str) -> None:
    """What `python -m` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
