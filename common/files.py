"""Atomic writing of files."""

import os
import platform
import re
import time
from pathlib import Path

HOST = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())[:40] or "host"
TEMPORARY = re.compile(r".+\.([A-Za-z0-9-]+)-(\d+)\.tmp")
OLD = 24 * 3600  # seconds after which a temporary file of another host is taken for a leftover
_swept: set[tuple[int, Path]] = set()
"""Folders whose leftovers this process has removed."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a name of this process's own, flush it to the disk and rename it over `path`.

    The first write to a folder removes what runs that died had not renamed there.
    """
    remove_leftovers(path.parent)
    temporary = path.with_name(f"{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of dead processes of this host, and old ones of others, once a process."""
    if (os.getpid(), folder) in _swept:
        return
    _swept.add((os.getpid(), folder))
    try:
        names = [entry for entry in os.scandir(folder) if entry.name.endswith(".tmp")]
    except OSError:
        return  # the write itself reports it
    for entry in names:
        match = TEMPORARY.fullmatch(entry.name)
        if match and entry.is_file(follow_symlinks=False) and is_leftover(match[1], int(match[2]), entry):
            Path(entry.path).unlink(missing_ok=True)


def is_leftover(host: str, process: int, entry: os.DirEntry) -> bool:
    """Whether the process that writes a temporary file has ended."""
    if host != HOST:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's process; no process id
        pass
    return False
