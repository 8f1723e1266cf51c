"""manifest.jsonl: which images of an output folder are complete and what made them; a part for each rank."""

import fcntl
import hashlib
import json
import math
import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .files import FileError, is_name_within, path_within, read_file, write_atomically
from .images import MAX_BYTES, is_image
from .prompts import check_prompt, is_text

NAME = "manifest.jsonl"
MAX_FILE = 2**32  # bytes of a file of records
Fields = Mapping[str, tuple[type, ...]]
IDENTITY: Fields = {"file": (str,), "seed": (int,), "prompt": (str,)}
CONTENT: Fields = {"bytes": (int,), "sha256": (str,)}
KEYS = frozenset({*IDENTITY, *CONTENT})
"""Of one image; what else a record holds is the same for all images of a folder."""
SETTINGS: Fields = {
    "solver": (str,),
    "predictor": (str, type(None)),
    "nodes": (list,),
    "depth": (int,),
    "evaluations": (int,),
    "guidance": (int, float),
    "guidance_rows": (int,),
    "finish": (str,),
    "backbone": (str,),
    "weights": (str, type(None)),
    "config": (dict,),
    "dtype": (str,),
}
NEWER = frozenset({"weights"})  # settings that manifests of earlier versions lack
HOLDER = re.compile(r"process \d+ on [^\n]*\n")


class ManifestError(UserError):
    """An output folder that holds other images than this run's; the message is one line for the user."""


def read_records(
    path: Path, fields: Fields = IDENTITY, remedy: str = "make all images anew", whole: bool = False
) -> list[dict]:
    """The complete lines of a manifest or another file of records.

    Args:
        path: the file; one that does not exist has none.
        fields: what each record must have, and of which types.
        remedy: what removing the file does, for the message.
        whole: whether a last line that a killed run left half written is refused instead of skipped.

    Raises:
        ManifestError: a line is no record, or of wrong types.
    """
    records: list[dict] = []
    if not os.path.lexists(path):
        return records
    lines = read_file(path, MAX_FILE).split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line) if line else None
        except (ValueError, RecursionError):
            if number == len(lines) and not whole:
                break
            record = line
        if record is not None:
            records.append(checked(record, fields, where, f"remove the line, or the file to {remedy}"))
    return records


def checked(record: Any, fields: Fields, where: str, remedy: str) -> dict:
    """record, if it is a mapping that has the fields, and those of a manifest, in their types.

    Raises:
        ManifestError: it is not; begins with `where` and ends with `remedy`.
    """
    if not isinstance(record, dict) or not record.keys() >= fields.keys():
        what = "the record of an image" if "file" in fields else f"a record with {', '.join(fields)}"
        raise ManifestError(f"{where}: not {what}; {remedy}")
    for key, types in {**SETTINGS, **CONTENT, **fields}.items():
        value = record.get(key)
        if key not in record:
            continue
        if type(value) not in types:
            names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in types)
            raise ManifestError(f"{where}: {key} is {short(value)}, expected {names}; {remedy}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ManifestError(f"{where}: {key} is {value}, expected a finite number; {remedy}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ManifestError(f"{where}: {key} is {short(value)}, expected an integer of 64 bits; {remedy}")
        if isinstance(value, str) and not is_text(value):
            raise ManifestError(f"{where}: {key} is {short(value)}, expected UTF-8 text; {remedy}")
    if "prompt" in fields:
        check_prompt(record["prompt"], f"{where}: prompt")
    if "file" in fields and not is_name_within(record["file"]):
        raise ManifestError(
            f"{where}: file is {short(record['file'])}, expected a name below the folder; it is not read;"
            f" {remedy}"
        )
    return record


def identity(record: Mapping) -> dict:
    """Which image a record is of: its file, seed and prompt."""
    return {key: record[key] for key in IDENTITY}


def content_facts(content: bytes) -> dict:
    """Length and SHA-256 of an image's file, as its record holds them."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def is_content(record: Mapping, content: bytes) -> bool:
    """Whether the bytes of an image's file are those that its record holds; a record without their hash is
    of an earlier version, and any whole image will do.
    """
    if "sha256" in record:
        return content_facts(content).items() <= record.items()
    return is_image(content)


def is_intact(folder: Path, record: Mapping) -> bool:
    """Whether the file of a record is there as it was written."""
    try:
        return is_content(record, read_file(path_within(folder, record["file"]), MAX_BYTES))
    except (OSError, FileError):
        return False


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
        remove_torn_line(file)
        file.write("".join(map(line_of, records)).encode())
        file.flush()
        os.fsync(file.fileno())


def remove_torn_line(file: BinaryIO) -> None:
    """Cut a file after its last newline, where it does not end with one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


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
        self.outdir, self.rank, self.settings = outdir, rank, settings
        self.part = part_of(outdir / NAME, rank)
        self.records: dict[str, dict] = {}
        for path in [outdir / NAME, *parts_of(outdir / NAME)]:
            for record in read_records(path):
                self._accept(path, record)

    def _accept(self, path: Path, record: dict) -> None:
        for key, value in self.settings.items():
            if record.get(key) != value and not (key in NEWER and key not in record):
                raise ManifestError(
                    f"{path} holds images with {key} {short(record.get(key))}, but this run has"
                    f" {short(value)}; choose another --outdir"
                )
        self.records[record["file"]] = record

    def has(self, record: dict) -> bool:
        """Whether this very image (file, seed, prompt) is recorded and, as rank 0 sees it, its file is as it
        was written.
        """
        known = self.records.get(record["file"])
        if known is None:
            return False
        if known["prompt"] != record["prompt"]:
            raise ManifestError(
                f"{self.outdir / record['file']} was made with prompt {short(known['prompt'])}, "
                f"but this run pairs its seed with {short(record['prompt'])}; choose another --outdir"
            )
        return self.rank > 0 or is_intact(self.outdir, known)

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
