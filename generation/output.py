"""Where images go: names of files, PNGs and grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.files import write_atomically


@dataclass(frozen=True)
class Output:
    """Where images go, in batches of how many, and what is written beside them."""

    outdir: Path
    batch: int = 64
    subdirs: bool = True
    grid: bool = False
    return_inters: bool = False
    pair_by_position: bool = False
    """Prompts pair with the positions of seeds in their list, not with the seeds (modulo the number of
    prompts).
    """

    def prompt(self, prompts: Sequence[str], position: int, seed: int) -> str:
        """The prompt of a seed; paired by seed, a job split over ranges of seeds makes the same images."""
        return prompts[(position if self.pair_by_position else seed) % len(prompts)]

    def name(self, seed: int) -> str:
        """File name of a seed's image, relative to outdir."""
        return f"{seed - seed % 1000:06d}/{seed:06d}.png" if self.subdirs else f"{seed:06d}.png"

    def grid_path(self, index: int) -> Path:
        """Where the grid of a batch goes."""
        return self.outdir / "grids" / f"batch_{index:04d}.png"

    def inter_path(self, seed: int, n: int) -> Path:
        """Where the decoded state of a seed after step n goes."""
        return self.outdir / "inters" / f"{seed:06d}" / f"step{n + 1:02d}.png"


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images [n, 3, H, W] side by side, nearly square unless `columns` is given: [3, rows H, columns W]."""
    columns = columns or max(1, round(len(images) ** 0.5))
    blank = images.new_ones((-len(images)) % columns, *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def to_uint8(image: Tensor) -> Tensor:
    """round(255 x) of values in [0, 1], as bytes on the CPU."""
    return (image.float().clamp(0, 1) * 255).round().byte().cpu()


def save_png(image: Tensor, path: Path) -> bytes:
    """Write an image [3, H, W] in [0, 1] as a PNG, as a whole or not at all; returns the file's content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(content, "PNG")
    write_atomically(path, content.getvalue())
    return content.getvalue()
