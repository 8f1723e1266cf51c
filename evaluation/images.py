"""The images of a folder with their prompts and seeds, in the order in which they are scored."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common.records as manifest
from common.files import path_within, read_file
from common.images import MAX_BYTES, MAX_PIXELS, decode_image
from common.prompts import read_prompts
from solvers import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
NAMED = re.compile(r"(\d{6,}/)?\d{6,}\.png")
MAX_BATCH = 2**28  # pixels of a batch: 3 GiB of float32


class ImagesError(UserError):
    """A folder of images that cannot be scored; the message is one line for the user."""


@dataclass(frozen=True)
class ImageSet:
    """A folder, the file, seed and prompt of each image, and what its manifest says of them all (nothing
    where it has none).
    """

    folder: Path
    records: list[dict]
    settings: dict

    def content(self, record: dict) -> bytes:
        """The bytes of an image's file, which must be those that its manifest records."""
        path = path_within(self.folder, record["file"])
        if not path.exists():
            raise ImagesError(
                f"{path} is in {manifest.NAME} but not there; make it again with sample.py, or remove its"
                " line"
            )
        content = read_file(path, MAX_BYTES)
        if "sha256" in record and not manifest.is_content(record, content):
            raise ImagesError(
                f"{path}: {len(content)} bytes, other than those that {manifest.NAME} records; make it again"
                " with the same sample.py command"
            )
        return content


def read_image_set(folder: Path, prompts: Path | None = None) -> ImageSet:
    """The images that the manifest of a folder lists; without one those below it, by sorted name, with the
    prompts of a file.

    A file has as many prompts as there are images, and an image's position is its seed. No images, neither
    manifest nor prompts, both, or images of two runs: ImagesError.
    """
    path = folder / manifest.NAME
    if not folder.is_dir():
        raise ImagesError(
            f"--images {folder}: not a folder; give the --outdir of sample.py, or a folder of images"
        )
    if manifest.parts_of(path):
        raise ImagesError(
            f"--images {folder}: sampling was not finished; run the same sample.py command again first"
        )
    if path.exists():
        if prompts is not None:
            raise ImagesError(
                f"--prompts {prompts}: {path} says the prompt of each image; leave the option out"
            )
        remedy = "make them with the same sample.py command"
        return from_manifest(folder, manifest.read_records(path, remedy=remedy, whole=True))
    if prompts is None:
        raise ImagesError(
            f"--images {folder}: no {manifest.NAME} says the prompts; give --prompts FILE to pair them by"
            " sorted file name"
        )
    files = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES
    )
    texts = read_prompts(prompts, "--prompts")
    if files and len(texts) != len(files):
        raise ImagesError(
            f"--prompts {prompts}: {len(texts)} prompts for the {len(files)} images in {folder}; they are"
            " paired by sorted file name, so give one prompt an image"
        )
    pairs = enumerate(zip(files, texts, strict=False))  # nonempty says it where there is no file
    return nonempty(
        ImageSet(folder, [{"file": file, "seed": i, "prompt": prompt} for i, (file, prompt) in pairs], {})
    )


def from_manifest(folder: Path, records: list[dict]) -> ImageSet:
    """The images of a manifest's records, of which all but the images' own must be the same."""
    names = Counter(record["file"] for record in records)
    if len(names) < len(records):
        raise ImagesError(
            f"{folder / manifest.NAME}: {names.most_common(1)[0][0]} is there twice; remove one of its lines"
        )
    settings = [{k: v for k, v in r.items() if k not in manifest.KEYS} for r in records]
    for other in settings:
        for key in sorted(other.keys() | settings[0].keys()):
            one, two = settings[0].get(key), other.get(key)
            if one != two and not (key in manifest.NEWER and None in (one, two)):
                difference = f"images with {key} {manifest.short(one)} and {manifest.short(two)}"
                raise ImagesError(
                    f"{folder / manifest.NAME}: {difference}; give every run a folder of its own"
                )
    check_listed(folder, names)
    own = [{k: r[k] for k in manifest.KEYS if k in r} for r in records]
    return nonempty(ImageSet(folder, own, settings[0] if settings else {}))


def check_listed(folder: Path, names: Collection[str]) -> None:
    """Refuse images, by the names that sample.py gives them, that a manifest does not list."""
    files = (
        p.relative_to(folder).as_posix() for pattern in ("*.png", "*/*.png") for p in folder.glob(pattern)
    )
    unlisted = sorted(file for file in files if NAMED.fullmatch(file) and file not in names)
    if unlisted:
        raise ImagesError(
            f"{folder / manifest.NAME}: lists {len(names)} images, but not {len(unlisted)} that are there,"
            f" such as {unlisted[0]}; run the same sample.py command again, or remove them"
        )


def nonempty(images: ImageSet) -> ImageSet:
    """The set, if it holds an image."""
    if not images.records:
        raise ImagesError(f"--images {images.folder}: holds no image; make some with sample.py")
    return images


def hash_of(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def decode(contents: Sequence[bytes], paths: Sequence[Path]) -> Tensor:
    """Files of B images of one size as a tensor [B, 3, H, W] in [0, 1]; `paths` is for the message of an
    error.
    """
    pixels: list[np.ndarray] = []
    limit = min(MAX_PIXELS, MAX_BATCH // len(contents))
    for content, path in zip(contents, paths, strict=True):
        pixels.append(np.asarray(decode_image(content, path, limit), dtype=np.float32))
        if pixels[-1].shape != pixels[0].shape:
            sizes = [
                f"{p} of {a.shape[1]} x {a.shape[0]}" for p, a in ((paths[0], pixels[0]), (path, pixels[-1]))
            ]
            raise ImagesError(
                f"images of unlike size in one batch: {sizes[0]} and {sizes[1]} pixels; give --batch 1"
            )
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1) / 255
