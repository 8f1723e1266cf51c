"""Which images of an output folder are done, and what made them: manifest.jsonl, one part a rank while running."""

import json
import os
from pathlib import Path

from solvers import UserError

NAME = "manifest.jsonl"


class ManifestError(UserError):
    """An output folder that holds something else than what is asked for; the message is one line for the user."""


def read_records(path: Path) -> list[dict]:
    """The complete lines of a manifest or part; a last line torn by a killed run is left out."""
    records: list[dict] = []
    if not path.exists():
        return records
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise ManifestError(f"{path}, line {number}: not JSON; remove the line, or the file to make all images anew") from None
    return records


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it: it is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class Manifest:
    """The records of an output folder by file name, and this rank's part for new ones."""

    def __init__(self, outdir: Path, rank: int, settings: dict):
        self.outdir, self.settings = outdir, settings
        self.part = outdir / f"manifest.part{rank:05d}.jsonl"
        self.records: dict[str, dict] = {}
        for path in [outdir / NAME, *sorted(outdir.glob("manifest.part*.jsonl"))]:
            for record in read_records(path):
                self._accept(path, record)

    def _accept(self, path: Path, record: dict) -> None:
        for key, value in self.settings.items():
            if record.get(key) != value:
                raise ManifestError(
                    f"{path} holds images with {key} {short(record.get(key))}, but this run has {short(value)}; choose another --outdir"
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
        with open(self.part, "a", encoding="utf-8") as file:
            for record in records:
                self.records[record["file"]] = record
                file.write(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def merge(outdir: Path) -> int:
        """Gather all parts into manifest.jsonl, sorted by seed; returns the number of images recorded."""
        parts = sorted(outdir.glob("manifest.part*.jsonl"))
        records = {r["file"]: r for path in [outdir / NAME, *parts] for r in read_records(path)}
        ordered = sorted(records.values(), key=lambda r: r["seed"])
        text = "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in ordered)
        write_atomically(outdir / NAME, text.encode())
        for path in parts:
            path.unlink()
        return len(ordered)


def short(value: object) -> str:
    """A value in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
