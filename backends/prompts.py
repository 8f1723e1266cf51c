"""Prompts from text and CSV files."""

import csv
import io
from pathlib import Path

from solvers import UserError


def read_prompts(path: Path, told_by: str) -> list[str]:
    """The prompts of a CSV file with a header (column text, prompt or caption, else the first) or of a text file, one a line.

    A file that cannot be read, or holds none: UserError that begins with `told_by`, the option or key that named it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        prompts = csv_column(text) if path.suffix.lower() == ".csv" else text.replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{told_by} {path}: cannot be read as UTF-8 text or CSV ({error})") from None
    prompts = [p.strip() for p in prompts if p.strip()]
    if not prompts:
        raise UserError(f"{told_by} {path}: holds no prompt; expected one a line, or a CSV with a column text, prompt or caption")
    return prompts


def csv_column(text: str) -> list[str]:
    """The cells of the prompt column of a CSV text: the one named text, prompt or caption, else the first."""
    csv.field_size_limit(2**24)
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    names = [name.strip().lower() for name in header]
    column = next((names.index(name) for name in ("text", "prompt", "caption") if name in names), 0)
    return [row[column] for row in rows if column < len(row)]
