"""manifest.jsonl: which images of an output folder are complete and what made them; a part for each rank."""

import fcntl
import json
import os
import platform
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError
from .files import write_atomically

NAME = "manifest.jsonl"
KEYS = frozenset({"file", "seed", "prompt"})
HOLDER = re.compile(r"process \d+ on [^\n]*\n")


class ManifestError(UserError):
    """An output folder that holds other images than this run's; the message is one line for the user."""


def read_records(
    path: Path, keys: Collection[str] = KEYS, remedy: str = "make all images anew"
) -> list[dict]:
    """The complete lines of a manifest or another file of records.

    Args:
        path: the file; one that does not exist has none.
        keys: what each record must have.
        remedy: what removing the file does, for the message.

    Raises:
        ManifestError: a line is no record; a last line that a killed run left half written is skipped.
    """
    records: list[dict] = []
    if not path.exists():
        return records
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line else None
        except ValueError:
            if number == len(lines):
                break
            record = line
        if record is None:
            continue
        if not isinstance(record, dict) or not record.keys() >= set(keys):
            raise ManifestError(
                f"{path}, line {number}: not the record of an image; remove the line, or the file to {remedy}"
            )
        records.append(record)
    return records


@contextmanager
def exclusive(outdir: Path, remedy: str = "wait for it, or choose another --outdir") -> Iterator[str]:
    """Lock an output folder for this run, until its end or the end of its process; yields the line that names
    the holder.

    The kernel frees the lock of a process that ends, however it ends. The file .lock holds the process and
    the host while it is held, and nothing afterwards; one that is a link or no file: ManifestError.
    """
    path = outdir / ".lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        lock = os.open(path, flags, 0o644)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be opened as a file ({error.strerror}); remove it") from None
    try:
        if not stat.S_ISREG(os.fstat(lock).st_mode):
            raise ManifestError(f"{path}: not a file; remove it")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = holder_of(lock)
            by = f" ({text})" if text else ""
            raise ManifestError(f"{outdir}: another run is writing here{by}; {remedy}") from None
        holder = f"process {os.getpid()} on {platform.node()}"
        written = write_holder(lock, holder)
        try:
            yield holder if written else ""
        finally:
            if written:
                os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def holder_of(lock: int) -> str:
    """The holder that an open lock names; nothing where it holds anything else."""
    text = os.pread(lock, 400, 0).decode("utf-8", "replace")
    return text.rstrip("\n") if HOLDER.fullmatch(text) else ""


def write_holder(lock: int, holder: str) -> bool:
    """Name the holder in an open lock, unless that is a file of something else or cannot be written."""
    if os.fstat(lock).st_nlink > 1 or (os.fstat(lock).st_size and not holder_of(lock)):
        return False
    try:
        os.ftruncate(lock, 0)
        return os.pwrite(lock, f"{holder}\n".encode(), 0) == len(holder) + 1
    except OSError:  # a full disk: the lock holds all the same
        return False


def part_of(path: Path, rank: int) -> Path:
    """A rank's part of a file of records."""
    return path.with_name(f"{path.stem}.part{rank:05d}.jsonl")


def parts_of(path: Path) -> list[Path]:
    """The parts of a file of records that are there."""
    return sorted(path.parent.glob(f"{path.stem}.part*.jsonl"))


def append_records(part: Path, records: list[dict]) -> None:
    """Add lines to a part, on the disk when this returns; a line that a killed run left half written is
    removed.
    """
    with open(part, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(map(line_of, records)).encode())
        file.flush()
        os.fsync(file.fileno())


def replace_records(path: Path, records: list[dict]) -> None:
    """Replace the content of a file and its parts by these records; a file that is equal stays as it is."""
    content = "".join(map(line_of, records)).encode()
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)
    for part in parts_of(path):
        part.unlink()


class Manifest:
    """The records of an output folder by file name, and this rank's part for new ones."""

    def __init__(self, outdir: Path, rank: int, settings: dict):
        self.outdir, self.settings = outdir, settings
        self.part = part_of(outdir / NAME, rank)
        self.records: dict[str, dict] = {}
        for path in [outdir / NAME, *parts_of(outdir / NAME)]:
            for record in read_records(path):
                self._accept(path, record)

    def _accept(self, path: Path, record: dict) -> None:
        for key, value in self.settings.items():
            if record.get(key) != value:
                raise ManifestError(
                    f"{path} holds images with {key} {short(record.get(key))}, but this run has"
                    f" {short(value)}; choose another --outdir"
                )
        self.records[record["file"]] = record

    def has(self, record: dict) -> bool:
        """Whether this very image (file, seed, prompt) is recorded and there."""
        known = self.records.get(record["file"])
        if known is None:
            return False
        if known["prompt"] != record["prompt"]:
            raise ManifestError(
                f"{self.outdir / record['file']} was made with prompt {short(known['prompt'])}, "
                f"but this run pairs its seed with {short(record['prompt'])}; choose another --outdir"
            )
        return (self.outdir / record["file"]).is_file()

    def add(self, records: list[dict]) -> None:
        """Append complete images to this rank's part; they survive whatever happens later."""
        self.records |= {record["file"]: record for record in records}
        append_records(self.part, records)

    @staticmethod
    def merge(outdir: Path) -> int:
        """Gather all parts into manifest.jsonl, sorted by seed; returns the number of images recorded."""
        path = outdir / NAME
        records = {r["file"]: r for part in [path, *parts_of(path)] for r in read_records(part)}
        replace_records(path, sorted(records.values(), key=lambda r: r["seed"]))
        return len(records)


def line_of(record: dict) -> str:
    """A record as a line of strict JSON."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"


def short(value: object) -> str:
    """A value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
