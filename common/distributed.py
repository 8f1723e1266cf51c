"""One process group of torch.distributed, its collectives, and loops divided among the ranks.

Every collective ends cleanly when a rank is lost: one line and exit status 2 (collective_errors).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import SharedError, UserError

RESUME_HINT = "what is complete is kept, run the same command again"
# a rank may have much more left to do than another; torchrun ends all when one dies
TIMEOUT = timedelta(days=1)
Part = TypeVar("Part")
Result = TypeVar("Result")


class StopRequested(Exception):
    """Work that was abandoned because the run was asked to stop; all ranks raise it at the same chunk."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, the device it should use, and the collectives."""

    rank: int
    world: int
    device: torch.device

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with collective_errors():
                dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world == 1:
            return value
        box = [value]
        with collective_errors():
            device = self.device if self.device.type == "cuda" else None
            dist.broadcast_object_list(box, src=0, device=device)
        return box[0]

    def on_first(self, action: Callable[[], Result]) -> Result:
        """What action() of rank 0 returns, on every rank; the UserError that it raises, too."""
        if self.world == 1:
            return action()
        result, reason = None, None
        if self.rank == 0:
            try:
                result = action()
            except UserError as error:
                reason = str(error)
            except OSError as error:
                if error.filename is None:
                    raise
                reason = f"{error.filename}: {error.strerror}"
        result, reason = self.broadcast((result, reason))
        if reason is not None:
            raise SharedError(reason)
        return result

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with collective_errors():
            dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        if self.world == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        with collective_errors():
            dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return bool(total)

    def all_gather(self, rows: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape, in the order of the ranks."""
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        with collective_errors():
            dist.all_gather(parts, rows)
        return parts

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All rows [n, d], on every rank, where rank r holds rows r, r + world, ...

        So the sum of the result is the same, bit for bit, for any number of ranks.
        """
        if self.world == 1:
            return rows
        counts = [int(n) for n in self.all_gather(torch.tensor([len(rows)], device=self.device))]
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        return torch.stack(self.all_gather(padded), 1).flatten(0, 1).cpu()[: sum(counts)]


def never() -> bool:
    """No stop is ever requested."""
    return False


def rank_parts(
    parts: Sequence[Part], ranks: Ranks, stop_requested: Callable[[], bool] = never
) -> Iterator[Part]:
    """This rank's parts: rank r has r, r + world, ...

    Args:
        parts: all parts.
        ranks: the processes.
        stop_requested: a collective that every rank calls before each round, with or without a part in it.

    Raises:
        StopRequested: on all ranks, once a stop was requested.
    """
    for first in range(0, len(parts), ranks.world):
        if stop_requested():
            raise StopRequested
        yield from parts[first : first + ranks.world][ranks.rank : ranks.rank + 1]


def distributed_map(
    measure: Callable[[slice], Tensor],
    count: int,
    chunk: int,
    ranks: Ranks,
    stop_requested: Callable[[], bool] = never,
) -> Tensor:
    """measure(rows i to j) -> [j - i, ...] over `count` rows, whose chunks the ranks take in turn.

    A row's chunk, and so its rounding, does not depend on the number of ranks.

    Args:
        measure: computes some rows.
        count: number of rows.
        chunk: rows in one call of `measure`.
        ranks: the processes.
        stop_requested: a collective that is asked before each round of chunks.

    Returns:
        [count, ...] float64.

    Raises:
        StopRequested: on all ranks, once a stop was requested.
    """
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    results = [measure(part).cpu().double() for part in rank_parts(parts, ranks, stop_requested)]
    width = ranks.broadcast(list(results[0].shape[1:]) if results else None)
    padded = torch.zeros(len(results), chunk, *width, dtype=torch.float64)
    for row, values in zip(padded, results, strict=True):
        row[: len(values)] = values
    return ranks.gather_rows(padded).flatten(0, 1)[:count].clone()


def use_single_thread(ranks: Ranks) -> None:
    """One thread a process on a CPU, so that sums have one order and a run the same bits on every machine."""
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)


def first_to_report() -> bool:
    """Whether no other rank has reported the end of this run, counted in torchrun's store, which
    outlives it.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"run ended, start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (KeyError, RuntimeError):
        return True  # there is none, or it ended with its rank


@contextmanager
def collective_errors() -> Iterator[None]:
    """Turn the failure of a collective, which means that another rank has ended, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        signal.set_wakeup_fd(-1)  # this line is enough
        if not first_to_report():
            raise SystemExit(2) from None
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"another process of this run has ended; {RESUME_HINT} ({reason})") from None


def install_sigterm_handler() -> None:
    """Turn SIGTERM into one line and exit status 2, even while this process waits for a device.

    torchrun sends it when another rank has ended. Under gloo the next collective fails and says so before;
    under nccl the device waits without an end.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # at once, whatever this process is doing
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        if first_to_report():
            text = (
                f"error: another process of this run has ended, or SIGTERM stopped this one; {RESUME_HINT}\n"
            )
            os.write(2, text.encode())
        os._exit(2)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def process_group(device: str | None = None) -> Iterator[Ranks]:
    """Join the group that torchrun describes in RANK, WORLD_SIZE and LOCAL_RANK (nccl on CUDA, else gloo).

    The CUDA device of this process becomes the current one, which libraries use for their kernels and pinned
    memory.
    """
    kind = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        use_device(kind)
        yield Ranks(0, 1, torch.device(kind))
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {world}, but {name} is not set: start with torchrun, or unset WORLD_SIZE"
            )
    if kind.startswith("cuda:"):
        raise UserError(
            f"--device {kind}: under torchrun every rank has a device of its own; give --device cuda"
        )
    if kind == "cuda":
        kind = f"cuda:{os.environ['LOCAL_RANK']}"
    use_device(kind)
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo", timeout=TIMEOUT)
    yield Ranks(dist.get_rank(), world, torch.device(kind))
    time.sleep(0.1)  # a thread of gloo may still hold the last collective; the group must not end within it
    dist.destroy_process_group()  # not after an error: it would wait for ranks that torchrun is about to end


def use_device(kind: str) -> None:
    """Make a device the current one of this process; touching another would create a context there."""
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
        raise UserError(
            f"device {kind!r} cannot be used: expected cpu, cuda, cuda:N or mps, as this machine has"
            f" ({reason})"
        ) from None
