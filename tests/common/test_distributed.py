"""One process without torchrun, several with it."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.distributed import collective_errors, install_sigterm_handler, process_group
from common.errors import UserError

from ..forked import Forked


def rank_of_two(out: Path) -> None:
    """One of two processes: a barrier, a sum over both, and the collectives of Ranks."""
    with process_group("cpu") as ranks:
        if ranks.rank == 0:
            time.sleep(0.5)
            (out / "before").touch()
        ranks.barrier()
        seen = (out / "before").exists()
        total = torch.tensor([ranks.rank + 1])
        dist.all_reduce(total)
        value, flag = ranks.broadcast(f"of rank {ranks.rank}"), ranks.any_rank(ranks.rank == 1)
        rows = ranks.gather_rows(torch.tensor([[0.0], [2.0]] if ranks.rank == 0 else [[1.0]]))
        text = f"{ranks.world} {ranks.device} {seen} {total.item()} {dist.get_backend()}"
        (out / f"rank{ranks.rank}").write_text(f"{text} {value} {flag} {rows.flatten().tolist()}")
    assert not dist.is_initialized()


@pytest.fixture
def alone(monkeypatch):
    """Without the variables that torchrun sets."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process(alone):
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.world, ranks.device) == (0, 1, torch.device("cpu"))
        assert not dist.is_initialized()
        ranks.barrier()  # returns


def test_torchrun_with_one_process_needs_no_group(alone, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)
        assert not dist.is_initialized()


def test_the_default_device(alone):
    with process_group() as ranks:
        assert ranks.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


class Devices:
    """A machine with CUDA devices that are not there: which of them were touched, and which one was made the
    current one.
    """

    def __init__(self, monkeypatch, count: int):
        self.touched, self.current, self.backends = [], [], []
        empty = torch.empty

        def touch(*sizes, device):
            place = torch.device(device)
            if (place.index or 0) >= count:
                raise RuntimeError("CUDA error: invalid device ordinal\nmore")
            self.touched.append(str(place))
            return empty(*sizes)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.current.append(str(device)))
        monkeypatch.setattr(torch, "empty", touch)
        monkeypatch.setattr(
            dist, "init_process_group", lambda backend, timeout: self.backends.append(backend)
        )
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(dist, "get_rank", lambda: int(os.environ["RANK"]))


def test_the_cuda_device_that_is_asked_for_becomes_the_current_one(alone, monkeypatch):
    devices = Devices(monkeypatch, 2)
    with process_group("cuda:1") as ranks:
        assert ranks.device == torch.device("cuda:1")
    assert (devices.touched, devices.current) == (["cuda:1"], ["cuda:1"])
    with process_group() as ranks:
        assert ranks.device == torch.device("cuda")
    with pytest.raises(UserError, match="device 'cuda:2' cannot be used"), process_group("cuda:2"):
        pass
    assert devices.current == ["cuda:1"]


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_rank_touches_its_own_device_only(alone, monkeypatch, device):
    devices = Devices(monkeypatch, 2)
    ranks_of = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name, value in ranks_of.items():
        monkeypatch.setenv(name, value)
    with process_group(device) as ranks:
        assert ranks.device == torch.device("cuda:1")
    assert (devices.touched, devices.current, devices.backends) == (["cuda:1"], ["cuda:1"], ["nccl"])
    with (
        pytest.raises(UserError, match="under torchrun every rank has a device of its own"),
        process_group("cuda:0"),
    ):
        pass
    assert devices.touched == ["cuda:1"]


def test_two_processes(tmp_path):
    """With the variables that torchrun sets; tests of the command lines start torchrun itself."""
    done = Forked(rank_of_two, tmp_path, ranks=2).wait()
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        text = (tmp_path / f"rank{rank}").read_text()
        assert text == "2 cpu True 3 gloo of rank 0 True [0.0, 1.0, 2.0]"


def wait_outside_python(ready: Path) -> None:
    """What a process does that waits for its device."""
    install_sigterm_handler()
    ready.touch()
    while True:
        ctypes.CDLL(None).sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGTERM")
def test_sigterm_ends_a_process_that_waits_for_its_device_in_a_line(tmp_path):
    """Outside Python's own loop a handler in Python would wait for ever."""
    ready = tmp_path / "ready"
    done = Forked(wait_outside_python, ready).signal_when(ready.exists, signal.SIGTERM)
    assert done.returncode == 2
    start = (
        "error: another process of this run has ended, or SIGTERM stopped this one; what is complete is kept"
    )
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_a_world_without_a_rank_is_refused(alone, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "WORLD_SIZE is 2, but RANK is not set: start with torchrun, or unset WORLD_SIZE"
    with pytest.raises(UserError, match=message), process_group("cpu"):
        pass


def test_memory_that_ends_in_a_collective_is_no_lost_rank():
    with pytest.raises(torch.OutOfMemoryError), collective_errors():
        raise torch.OutOfMemoryError("CUDA out of memory")
