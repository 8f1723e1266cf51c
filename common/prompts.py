"""Prompts from text, CSV and COCO caption files, and the seeds that they pair with."""

import csv
import io
import json
from pathlib import Path

from .errors import UserError

FOLDER = Path(__file__).parents[1] / "src" / "prompts"
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
        text = path.read_bytes().decode("utf-8-sig")
        prompts = READERS.get(path.suffix.lower(), lines)(text)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{option} {path}: cannot be read as UTF-8 text, CSV or COCO captions ({error})"
        ) from None
    prompts = [p.strip() for p in prompts if p.strip()]
    if not prompts:
        expected = "one a line, a CSV with a column text, prompt or caption, or a COCO JSON with captions"
        raise UserError(f"{option} {path}: holds no prompt; expected {expected}")
    return prompts


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
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (part.isascii() and first.isdigit()) or (dash and not last.isdigit()):
            raise UserError(f"{option} {text!r}: {part.strip()!r} is neither a seed nor a range such as 0-63")
        if dash and int(last) < int(first):
            raise UserError(f"{option} {text!r}: the range {part.strip()} is reversed; write {last}-{first}")
        seeds += range(int(first), int(last if dash else first) + 1)
    twice = {s for s in seeds if seeds.count(s) > 1} if len(seeds) < 10000 else set(seeds[len(set(seeds)) :])
    if twice:
        raise UserError(f"{option} {text!r}: seed {min(twice)} is there twice, but a seed names one image")
    if max(seeds) >= 2**32:  # a CPU generator uses 32 bits of a seed
        raise UserError(f"{option} {text!r}: {max(seeds)} is too large, expected less than 2^32")
    return seeds
