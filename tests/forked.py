"""Python processes that start at once: forks of one that has imported the libraries, where `python -m` takes seconds to import them.

For tests of what a process computes, or leaves behind when it is killed, and of what several compute as ranks of a group. Tests of how
ranks are started and of what is told when one dies use torchrun itself.
"""

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
    """A function in one process, or in each of a group of ranks with the variables that torchrun sets; each leads a session of its own."""

    def __init__(self, function: Callable, *arguments: object, ranks: int = 1, environment: dict[str, str] | None = None, cwd=ROOT):
        with patch.dict(os.environ, SETTINGS):
            multiprocessing.forkserver.ensure_running()
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        for told in group(ranks) if ranks > 1 else [{}]:
            told = SETTINGS | told | (environment or {})
            process = CONTEXT.Process(target=run, args=(self.folder.name, told, cwd, function, arguments), daemon=True)
            process.start()
            self.processes.append(process)
        self.pid = self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """That of the first rank, negative for a signal; None while it runs."""
        return self.processes[0].exitcode

    def wait(self, timeout: float = 200) -> subprocess.CompletedProcess:
        """How it ended and what it printed; as with torchrun, ranks whose peer failed are ended."""
        left = {p.sentinel: p for p in self.processes}
        failed = None
        while left:
            ready = multiprocessing.connection.wait(left, timeout)
            assert ready, f"still running after {timeout} s: {self.printed('stderr')}"
            for sentinel in ready:
                process = left.pop(sentinel)
                process.join()
                failed = failed or process.exitcode
            for process in left.values() if failed else ():
                process.terminate()
        return subprocess.CompletedProcess([], failed or 0, self.printed("stdout"), self.printed("stderr"))

    def signal_when(self, done: Callable[[], bool], number: int = signal.SIGKILL, group: bool = True) -> subprocess.CompletedProcess:
        """End it, and all that it started as a group, by a signal as soon as something is done and before it ends by itself."""
        deadline = time.monotonic() + 120
        while not done():
            assert self.returncode is None, self.printed("stderr")
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (os.killpg if group else os.kill)(self.pid, number)
        return self.wait()

    def printed(self, name: str) -> str:
        """All that went to a standard stream so far."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""


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
    os.environ.update(environment)
    os.chdir(cwd)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    function(*arguments)


def run_module(module: str, *arguments: str) -> None:
    """What `python -m` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
