"""Prompts from text, CSV and COCO caption files, and the seeds that they pair with."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError
from .files import read_file

FOLDER = Path(__file__).parents[1] / "src" / "prompts"
SEEDS = 2**32  # that differ: a CPU generator uses 32 bits of a seed
MAX_PROMPT = 2**16  # characters; text encoders read some hundred words
MAX_SEEDS = 10**7  # of one run
TRAIN, TEST = FOLDER / "train.txt", FOLDER / "test.txt"
COCO = FOLDER / "MS-COCO_val2014_30k_captions.csv"
"""The captions of the published system: not shipped, used where the file exists."""


def default_prompts(dataset_name: str | None) -> Path:
    """The default training prompts: for ms_coco the COCO captions where they exist, else the
    project's own.
    """
    return COCO if dataset_name == "ms_coco" and COCO.is_file() else TRAIN


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a text file, one a line, of a CSV file, or of the captions of a COCO JSON file.

    Raises:
        UserError: the file cannot be read or holds none; begins with `option`, which named it.
    """
    try:
        text = read_file(path).decode("utf-8-sig")
        prompts = READERS.get(path.suffix.lower(), lines)(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{option} {path}: cannot be read as UTF-8 text, CSV or COCO captions ({error})"
        ) from None
    prompts = [p.strip() for p in prompts if p.strip()]
    if not prompts:
        expected = "one a line, a CSV with a column text, prompt or caption, or a COCO JSON with captions"
        raise UserError(f"{option} {path}: holds no prompt; expected {expected}")
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, f"{option} {path}: prompt {number}")
    return prompts


def check_prompt(prompt: str, shown: str) -> None:
    """Refuse what is no prompt: too long a text, a NUL, or half a surrogate pair; the UserError begins with
    `shown`.
    """
    if len(prompt) > MAX_PROMPT:
        raise UserError(
            f"{shown}, {prompt[:40]!r}...: {len(prompt)} characters, expected at most {MAX_PROMPT}"
        )
    if "\0" in prompt:
        raise UserError(f"{shown}, {prompt[:40]!r}: a NUL character; save the text as UTF-8")
    if not is_text(prompt):
        raise UserError(f"{shown}, {prompt[:40]!a}: not UTF-8 text")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: no half of a surrogate pair is in it."""
    return value.isprintable() or not any("\ud800" <= c <= "\udfff" for c in value)


def lines(text: str) -> list[str]:
    """The lines of a text."""
    return text.replace("\r\n", "\n").split("\n")


def csv_column(text: str) -> list[str]:
    """The cells of the prompt column of a CSV text: the one named text, prompt or caption, else the first."""
    csv.field_size_limit(2**24)
    header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    names = [name.strip().lower() for name in header]
    column = next((names.index(name) for name in ("text", "prompt", "caption") if name in names), 0)
    return [row[column] for row in rows if column < len(row)]


def coco_captions(text: str) -> list[str]:
    """The first caption of each image of a COCO caption file, in order of image id; else ValueError."""
    document = json.loads(text)
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("no list named annotations")
    first: dict[int, str] = {}
    for at, annotation in enumerate(annotations):
        image, caption = (
            (annotation.get("image_id"), annotation.get("caption"))
            if isinstance(annotation, dict)
            else (None, None)
        )
        if type(image) is not int or not isinstance(caption, str):
            raise ValueError(f"annotations[{at}] lacks a numeric image_id or a caption")
        caption.encode()  # half a surrogate pair is no text
        if caption.strip():
            first.setdefault(image, caption)
    return [first[image] for image in sorted(first)]


READERS = {".csv": csv_column, ".json": coco_captions}


def parse_seeds(text: str, option: str = "--seeds") -> list[int]:
    """The seeds of "0,3,10-12": [0, 3, 10, 11, 12]; else a UserError that begins with `option`."""
    shown = f"{option} {text[:100]!r}"
    ranges = [range_of(part.strip(), shown) for part in text.split(",")]
    count = sum(map(len, ranges))
    if count > MAX_SEEDS:
        raise UserError(f"{shown}: {count} seeds, expected at most {MAX_SEEDS} in one run")
    end = 0
    for part in sorted(ranges, key=lambda part: part.start):
        if part.start < end:
            raise UserError(f"{shown}: seed {part.start} is there twice, but a seed names one image")
        end = max(end, part.stop)
    return [seed for part in ranges for seed in part]


def range_of(part: str, shown: str) -> range:
    """The seeds of "3" or "10-12"; else a UserError that begins with `shown`."""
    first, dash, last = part.partition("-")
    if not (part.isascii() and first.isdigit()) or (dash and not last.isdigit()):
        raise UserError(f"{shown}: {part[:30]!r} is neither a seed nor a range such as 0-63")
    first, last = (digits.lstrip("0") or "0" for digits in (first, last if dash else first))
    for digits in (first, last):
        if len(digits) > 10 or int(digits) >= SEEDS:
            raise UserError(f"{shown}: {digits[:30]} is too large, expected less than 2^32")
    if int(last) < int(first):
        raise UserError(f"{shown}: the range {part} is reversed; write {last}-{first}")
    return range(int(first), int(last) + 1)


def check_seeds(seeds: Iterable[int]) -> None:
    """Refuse seeds whose noise is that of other seeds: UserError."""
    for seed in seeds:
        if not 0 <= seed < SEEDS:
            raise UserError(
                f"seed {seed}: expected 0 to {SEEDS - 1}, since noise depends on 32 bits of a seed"
            )
