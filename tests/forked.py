"""Processes as torchrun starts them, but all of them forks of one that has imported the libraries: python forked.py N MODULE ARGUMENTS.

Tests of what several processes compute use it; those of how they start, die and are told of it use torchrun itself.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def forked(processes: int, module: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run `python -m module arguments` in so many processes with the variables that torchrun sets."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(processes), module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def fork(processes: int, function: Callable, *arguments: object) -> None:
    """Call a function in so many forks of this process, which should have imported what it needs and done nothing else."""
    from torch.distributed import TCPStore
    from torch.multiprocessing import start_processes

    import backends.ldm  # noqa: F401  diffusers and transformers, once for every rank

    port = TCPStore("127.0.0.1", 0, is_master=True).port  # a free one
    start_processes(as_rank, (processes, port, function, arguments), nprocs=processes, start_method="fork")


def as_rank(rank: int, world: int, port: int, function: Callable, arguments: tuple) -> None:
    """One of the processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    function(*arguments)


def run_module(module: str, *arguments: str) -> None:
    """What `python -m` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    fork(int(sys.argv[1]), run_module, *sys.argv[2:])
