"""One way from prompts and seeds to image files, for every backbone and solver: generate()."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from backends import Backend
from backends.distributed import Ranks
from backends.points import Points
from manifest import Manifest, exclusive
from solvers import Solver, compile_tableau, sample
from solvers.files import write_atomically


@dataclass(frozen=True)
class Sampler:
    """A backbone, a solver on its nodes, guidance and finish: all that decides an image besides prompt and seed."""

    backend: Backend
    solver: Solver
    solver_name: str
    sigmas: Tensor
    guidance_scale: float
    finish: str = "none"
    predictor: Path | None = None
    points: Points = field(default_factory=Points)

    @cached_property
    def cost(self):
        """The compiled tableau, off which serial depth and evaluations are read."""
        return compile_tableau(self.solver, self.sigmas, self.finish)

    @property
    def guidance_rows(self) -> int:
        """Network rows of an evaluation: 2 where guidance needs the unconditional answer as well."""
        return 2 if self.guidance_scale != 1 and self.backend.guidance_doubles else 1

    @property
    def steps(self) -> int:
        """How many states the solver goes through."""
        return self.solver.num_steps(self.sigmas)

    def settings(self) -> dict:
        """What the manifest says of every image."""
        return {
            "solver": self.solver_name,
            "predictor": None if self.predictor is None else hashlib.sha256(self.predictor.read_bytes()).hexdigest(),
            "nodes": self.sigmas.tolist(),
            "depth": self.cost.depth,
            "evaluations": self.cost.evaluations,
            "guidance": self.guidance_scale,
            "guidance_rows": self.guidance_rows,
            "finish": self.finish,
            "backbone": f"{self.backend.name}: {self.backend.identity()}",
            "config": self.backend.image_options(),
            "dtype": str(self.backend.dtype).removeprefix("torch."),
        }

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], callback=None) -> Tensor:
        """Final latents [B, C, H, W] of B prompts and seeds; callback(n, x) sees those after step n."""
        with torch.inference_mode():
            velocity = self.points.velocity(self.backend, self.backend.encode(prompts, self.guidance_scale))
            x = self.backend.start(seeds, self.sigmas[0])
            return sample(self.solver, velocity, x, self.sigmas, callback, self.finish)

    def images(self, prompts: Sequence[str], seeds: Sequence[int], callback=None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of B prompts and seeds."""
        with torch.inference_mode():
            return self.backend.decode(self.latents(prompts, seeds, callback))


@dataclass(frozen=True)
class Output:
    """Where images go, and what beside them."""

    outdir: Path
    batch: int = 64
    subdirs: bool = True
    grid: bool = False
    return_inters: bool = False
    pair_by_position: bool = False
    """Prompts pair with the positions of seeds in their list, not with the seeds themselves (modulo the number of prompts)."""

    def prompt(self, prompts: Sequence[str], position: int, seed: int) -> str:
        """The prompt of a seed; by seed, a job that is split over ranges of seeds makes the same images."""
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


def generate(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], output: Output, ranks: Ranks) -> int:
    """Write the image of each seed and the manifest; returns how many images this rank made.

    Prompts pair with seeds as `output` says and repeat. Batches are fixed by position in the seed list and shared out
    whole over the ranks, unless these share out the points of each level (Sampler.points): then all make each batch,
    and rank 0 writes it. One that is complete is skipped, an incomplete one is made again as a whole, so that a run that
    was interrupted ends in the very same files.
    """
    output.outdir.mkdir(parents=True, exist_ok=True)
    with exclusive(output.outdir) if ranks.rank == 0 else nullcontext():
        settings = sampler.settings()
        manifest = Manifest(output.outdir, ranks.rank, settings)
        records = [{"file": output.name(s), "seed": s, "prompt": output.prompt(prompts, i, s)} | settings for i, s in enumerate(seeds)]
        batches = [records[i : i + output.batch] for i in range(0, len(records), output.batch)]
        missing = [i for i, batch in enumerate(batches) if not complete(manifest, i, batch, output, sampler.steps)]
        ranks.barrier()  # every rank has read the parts of an earlier run
        todo = [(i, batches[i]) for i in ranks.agreed(missing)]
        if ranks.rank == 0:
            Manifest.merge(output.outdir)
        ranks.barrier()
        together = sampler.points.ranks is not None
        mine = todo if together else todo[ranks.rank :: ranks.world]
        needed = dict.fromkeys(record["prompt"] for _, batch in mine for record in batch)
        sampler.backend.encode_ahead(list(needed), sampler.guidance_scale)
        with tqdm(total=sum(len(b) for _, b in mine), unit="image", desc=sampler.solver_name, disable=ranks.rank > 0 or None) as bar:
            for i, batch in mine:
                if together and ranks.rank > 0:
                    sampler.latents([r["prompt"] for r in batch], [r["seed"] for r in batch])
                    continue
                write_batch(sampler, i, batch, output)
                manifest.add(batch)
                bar.update(len(batch))
        ranks.barrier()
        if ranks.rank == 0:
            Manifest.merge(output.outdir)
    return 0 if together and ranks.rank > 0 else sum(len(b) for _, b in mine)


def complete(manifest: Manifest, index: int, batch: list[dict], output: Output, steps: int) -> bool:
    """Whether all files of a batch are there; an image of another prompt is refused."""
    images = [manifest.has(record) for record in batch]
    beside = [output.grid_path(index)] if output.grid else []
    if output.return_inters:
        beside += [output.inter_path(record["seed"], steps - 1) for record in batch]
    return all(images) and all(path.is_file() for path in beside)


def write_batch(sampler: Sampler, index: int, batch: list[dict], output: Output) -> None:
    """Make and write the images of one batch, and what goes beside them."""

    def save_step(n: int, x: Tensor) -> None:
        for record, image in zip(batch, sampler.backend.decode(x), strict=True):
            save_png(image, output.inter_path(record["seed"], n))

    seeds, prompts = [r["seed"] for r in batch], [r["prompt"] for r in batch]
    images = sampler.images(prompts, seeds, save_step if output.return_inters else None)
    for record, image in zip(batch, images, strict=True):
        save_png(image, output.outdir / record["file"])
    if output.grid:
        save_png(make_grid(images), output.grid_path(index))


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images [n, 3, H, W] side by side in rows, nearly square unless `columns` says otherwise: [3, rows H, columns W]."""
    columns = columns or max(1, round(len(images) ** 0.5))
    blank = images.new_ones((-len(images)) % columns, *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns))
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def to_uint8(image: Tensor) -> Tensor:
    """round(255 x) of values in [0, 1], as bytes on the CPU."""
    return (image.float().clamp(0, 1) * 255).round().byte().cpu()


def save_png(image: Tensor, path: Path) -> None:
    """Write an image [3, H, W] in [0, 1] as a PNG, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(content, "PNG")
    write_atomically(path, content.getvalue())
