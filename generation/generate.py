"""One way from prompts and seeds to image files, for every backbone and solver: generate()."""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor
from tqdm import tqdm

from common.distributed import Ranks
from common.records import Manifest, exclusive

from .output import Output, make_grid, save_png
from .sampler import Sampler

Batch = list[dict]  # the manifest's records of its images


def generate(
    sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], output: Output, ranks: Ranks
) -> int:
    """Write the image of each seed and the manifest; returns how many images this rank made.

    Batches are fixed by position in the seed list. The ranks take whole batches in turn, unless they divide
    the points of each level (Sampler.evaluator): then all make each batch, and rank 0 writes it. A complete
    batch is skipped and an incomplete one made again as a whole, so that an interrupted run ends in the very
    same files.

    Args:
        sampler: backbone, solver, nodes and guidance.
        prompts: they pair with seeds as `output` says, and repeat.
        seeds: one image each.
        output: folder, batch size and what is written beside the images.
        ranks: the processes.

    Raises:
        ManifestError: the folder holds other images, or another run is writing there.
    """
    output.outdir.mkdir(parents=True, exist_ok=True)
    with exclusive(output.outdir) if ranks.rank == 0 else nullcontext():
        manifest = Manifest(output.outdir, ranks.rank, sampler.settings())
        batches = make_batches(prompts, seeds, output, manifest.settings)
        missing = [
            i for i, batch in enumerate(batches) if not is_complete(manifest, i, batch, output, sampler.steps)
        ]
        ranks.barrier()  # every rank has read the parts of an earlier run
        todo = [(i, batches[i]) for i in ranks.broadcast(missing)]
        merge(manifest, ranks)
        ranks.barrier()
        made = write_batches(sampler, todo, output, manifest, ranks)
        ranks.barrier()
        merge(manifest, ranks)
    return made


def make_batches(prompts: Sequence[str], seeds: Sequence[int], output: Output, settings: dict) -> list[Batch]:
    """The records of all images, batch by batch."""
    records = [
        {"file": output.name(s), "seed": s, "prompt": output.prompt(prompts, i, s)} | settings
        for i, s in enumerate(seeds)
    ]
    return [records[i : i + output.batch] for i in range(0, len(records), output.batch)]


def is_complete(manifest: Manifest, index: int, batch: Batch, output: Output, steps: int) -> bool:
    """Whether all files of a batch exist; an image of another prompt is refused."""
    images = [manifest.has(record) for record in batch]
    extra = [output.grid_path(index)] if output.grid else []
    if output.return_inters:
        extra += [output.inter_path(record["seed"], steps - 1) for record in batch]
    return all(images) and all(path.is_file() for path in extra)


def merge(manifest: Manifest, ranks: Ranks) -> None:
    """Gather the ranks' parts of the manifest."""
    if ranks.rank == 0:
        Manifest.merge(manifest.outdir)


def write_batches(
    sampler: Sampler, todo: list[tuple[int, Batch]], output: Output, manifest: Manifest, ranks: Ranks
) -> int:
    """Make and write the batches of this rank; returns how many images it wrote."""
    divides_points = sampler.evaluator.ranks is not None
    batches = todo if divides_points else todo[ranks.rank :: ranks.world]
    prompts = dict.fromkeys(record["prompt"] for _, batch in batches for record in batch)
    sampler.backend.precompute_embeddings(list(prompts), sampler.guidance_scale)
    count = sum(len(batch) for _, batch in batches)
    with tqdm(total=count, unit="image", desc=sampler.solver_name, disable=ranks.rank > 0 or None) as bar:
        for index, batch in batches:
            if divides_points and ranks.rank > 0:
                sampler.latents([r["prompt"] for r in batch], [r["seed"] for r in batch])
                continue
            write_batch(sampler, index, batch, output)
            manifest.add(batch)
            bar.update(len(batch))
    return 0 if divides_points and ranks.rank > 0 else count


def write_batch(sampler: Sampler, index: int, batch: Batch, output: Output) -> None:
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
