"""The images of a folder with their prompts and seeds, in the order in which they are scored."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import common.records as manifest
from common.prompts import read_prompts
from solvers import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")


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
        """The bytes of an image's file."""
        path = self.folder / record["file"]
        if not path.is_file():
            raise ImagesError(
                f"{path} is in {manifest.NAME} but not there; make it again with sample.py, or remove its"
                " line"
            )
        return path.read_bytes()


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
    if path.is_file():
        if prompts is not None:
            raise ImagesError(
                f"--prompts {prompts}: {path} says the prompt of each image; leave the option out"
            )
        return from_manifest(folder, manifest.read_records(path))
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
    """The images of a manifest's records; what is said of each must be of the right type, and all else the
    same for all.
    """
    for record in records:
        for key, kind in (("file", str), ("seed", int), ("prompt", str)):
            if type(record[key]) is not kind:
                raise ImagesError(
                    f"{folder / manifest.NAME}: {key} is {manifest.short(record[key])}, expected"
                    f" {kind.__name__}"
                )
    names = Counter(record["file"] for record in records)
    if len(names) < len(records):
        raise ImagesError(
            f"{folder / manifest.NAME}: {names.most_common(1)[0][0]} is there twice; remove one of its lines"
        )
    settings = [{k: v for k, v in r.items() if k not in manifest.KEYS} for r in records]
    for other in settings:
        for key in sorted(other.keys() | settings[0].keys()):
            one, two = settings[0].get(key), other.get(key)
            if one != two:
                difference = f"images with {key} {manifest.short(one)} and {manifest.short(two)}"
                raise ImagesError(
                    f"{folder / manifest.NAME}: {difference}; give every run a folder of its own"
                )
    own = [{k: r[k] for k in ("file", "seed", "prompt")} for r in records]
    return nonempty(ImageSet(folder, own, settings[0] if settings else {}))


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
    pixels = []
    for content, path in zip(contents, paths, strict=True):
        try:
            pixels.append(np.asarray(Image.open(BytesIO(content)).convert("RGB"), dtype=np.float32))
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ImagesError(
                f"{path}: not a readable image ({' '.join(str(error).split())[:100]}); make it again"
            ) from None
        if pixels[-1].shape != pixels[0].shape:
            sizes = [
                f"{p} of {a.shape[1]} x {a.shape[0]}" for p, a in ((paths[0], pixels[0]), (path, pixels[-1]))
            ]
            raise ImagesError(
                f"images of unlike size in one batch: {sizes[0]} and {sizes[1]} pixels; give --batch 1"
            )
    return torch.from_numpy(np.stack(pixels)).movedim(-1, 1) / 255
