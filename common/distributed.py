"""The process group of a torchrun launch, or the single process without one."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .base import BackendError

KEPT = "what is complete is kept, run the same command again"
PATIENCE = timedelta(days=1)  # a rank may have much more left to do than another; torchrun ends all when one dies


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and the device it should use."""

    rank: int
    world: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with lost_ranks_told():
                dist.barrier()

    def agreed(self, value: Any) -> Any:
        """What rank 0 says, on every rank."""
        told = [value]
        if self.world > 1:
            with lost_ranks_told():
                dist.broadcast_object_list(told)
        return told[0]


def first_to_tell() -> bool:
    """Whether no other rank has told of the end of this run: counted in torchrun's store, which outlives the ranks."""
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"lost rank told, start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, RuntimeError):
        return True  # there is none, or it ended with its rank


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Make the failure of a collective, which means that another rank has ended, one line for the user and exit status 2."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        signal.set_wakeup_fd(-1)  # this line is enough
        if not first_to_tell():
            raise SystemExit(2) from None
        reason = " ".join(str(error).split())[:120]
        raise BackendError(f"another process of this run has ended; {KEPT} ({reason})") from None


def tell_of_sigterm() -> None:
    """Make SIGTERM one line and exit status 2, even while this process waits for a device.

    torchrun sends it when another rank has ended. Under gloo the next collective fails and says so before; under nccl
    the device waits without an end.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # told at once, whatever this process is doing
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        if first_to_tell():
            os.write(2, f"error: another process of this run has ended, or SIGTERM stopped this one; {KEPT}\n".encode())
        os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def process_group(device: str | None = None) -> Iterator[Ranks]:
    """Join the group that torchrun describes in RANK, WORLD_SIZE and LOCAL_RANK (nccl on CUDA, else gloo).

    The CUDA device of this process becomes the current one, which libraries use for their kernels and pinned memory.
    """
    kind = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        use_device(kind)
        yield Ranks(0, 1, torch.device(kind))
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BackendError(f"WORLD_SIZE is {world}, but {name} is not set: start with torchrun, or unset WORLD_SIZE")
    if kind.startswith("cuda:"):
        raise BackendError(f"--device {kind}: under torchrun every rank has a device of its own; give --device cuda")
    if kind == "cuda":
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    use_device(kind)
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo", timeout=PATIENCE)
    yield Ranks(dist.get_rank(), world, torch.device(kind))
    time.sleep(0.1)  # a thread of gloo may still let go of the last collective; the group must not end within it
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks, which torchrun is about to end


def use_device(kind: str) -> None:
    """Make a device the current one of this process; no other device is touched, which would create a CUDA context there."""
    check_device(kind)
    device = torch.device(kind)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def check_device(kind: str) -> None:
    """Refuse a device that does not exist, in one line."""
    try:
        if torch.device(kind).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{kind} holds no numbers")
        torch.empty(0, device=kind)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"device {kind!r} cannot be used: expected cpu, cuda, cuda:N or mps, as this machine has ({reason})") from None
