"""Files of users: read only where they are files and of a bounded size, written as a whole or not at all."""

import os
import platform
import re
import stat
import time
from pathlib import Path, PurePosixPath

from .errors import UserError

MAX_BYTES = 2**30


class FileError(UserError):
    """A file that is not read; the message is one line that names it."""


def read_file(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a file.

    Raises:
        FileError: a pipe, a device or a folder, which is not read, or more than `limit` bytes.
        OSError: it cannot be opened or read.
    """
    if "\0" in str(path):
        raise FileError(f"{str(path)!r}: a name with a NUL byte; correct it")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is opened without a wait
    with open(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise FileError(f"{path}: not a file; remove it, or name a file")
        content = file.read(limit + 1) if info.st_size <= limit else b""
    if max(len(content), info.st_size) > limit:
        raise FileError(f"{path}: {info.st_size} bytes, expected at most {limit}")
    return content


def is_name_within(name: str) -> bool:
    """Whether a name that some file holds is that of a file below that file's folder, links left aside."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "\0" not in name and parts[0] != "/" and ".." not in parts


def path_within(folder: Path, name: str) -> Path:
    """The path of a file below a folder, by a name that some file holds.

    Raises:
        FileError: an absolute name, one with .. or a NUL byte, or a link that leads out of the folder.
    """
    if is_name_within(name) and (folder / name).resolve().is_relative_to(folder.resolve()):
        return folder / name
    raise FileError(
        f"{folder}: {name[:200]!r} is not a file of this folder, and is not read; put a copy of it there"
    )


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
