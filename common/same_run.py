"""What all ranks of a run must have in common: settings, prompts, weights and the folder they write to."""

import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .distributed import Ranks
from .errors import SharedError, UserError
from .records import exclusive

VISIBLE_WITHIN = 10.0  # seconds after which what another machine wrote is seen on shared storage


def check_same(ranks: Ranks, values: Mapping[str, object]) -> None:
    """Refuse ranks whose settings differ from rank 0's, by the names of what differs.

    Args:
        ranks: the processes.
        values: what must be the same, by its name in the message; anything that JSON can hold.

    Raises:
        SharedError: on every rank.
    """
    if ranks.world == 1:
        return
    own = {name: hash_of(value) for name, value in values.items()}
    everyone = ranks.gather((own, platform.node()))
    first, host = everyone[0]
    for rank, (other, other_host) in enumerate(everyone):
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if names:
            raise SharedError(
                f"rank {rank} on {other_host} has other {', '.join(names)} than rank 0 on {host}; start all"
                " ranks with the same command, files and weights"
            )


def hash_of(value: object) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def locked_by_run(
    folder: Path, ranks: Ranks, remedy: str = "wait for it, or choose another --outdir"
) -> Iterator[None]:
    """Lock a folder for all ranks of a run; rank 0 holds the lock, and the others must see it there.

    Raises:
        SharedError, ManifestError: on every rank, where another run holds it or the ranks do not share it.
    """
    with ExitStack() as stack:
        if ranks.world == 1:
            stack.enter_context(exclusive(folder, remedy))
        else:
            holder = ranks.on_first(lambda: stack.enter_context(exclusive(folder, remedy)))
            check_shared(folder, ranks, holder)
        yield


def check_shared(folder: Path, ranks: Ranks, holder: str) -> None:
    """Refuse a folder in which a rank does not see the lock that rank 0 holds: SharedError on every rank."""
    if not holder:
        return
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not (seen := sees(folder, holder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = ranks.gather((seen, f"{folder} on {platform.node()}"))
    for rank, (sees_it, where) in enumerate(everyone):
        if not sees_it:
            raise SharedError(
                f"rank {rank} writes to {where}, which is not the folder {everyone[0][1]} of rank 0; give all"
                " ranks one folder on storage that they share"
            )


def sees(folder: Path, holder: str) -> bool:
    """Whether the lock of a folder names a holder."""
    try:
        return (folder / ".lock").read_text(encoding="utf-8") == f"{holder}\n"
    except (OSError, UnicodeDecodeError):
        return False


def check_complete(folder: Path, wanted: int, recorded: int) -> None:
    """Refuse a folder that lacks records after the ranks' parts were gathered."""
    if recorded < wanted:
        raise UserError(
            f"{folder}: {wanted - recorded} of {wanted} images of this run are not there after all ranks"
            " ended; is the folder on storage that all ranks share, and did nothing else change it? Run the"
            " same command again"
        )
