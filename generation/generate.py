"""From a request to image files, for every backbone and solver: run_request, generate, Sampler."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends import Backend, load_backend
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks, install_sigterm_handler, process_group
from common.errors import UserError, note
from common.images import holds_image
from common.records import NAME, Manifest, content_facts, read_records
from common.same_run import check_complete, check_same, locked_by_run
from solvers import BASELINES, Solver, Tableau, baseline_of, compile_tableau, sample

from .output import Output, make_grid, save_png
from .request import PromptOptions, ResolvedRequest, SamplingRequest, resolve

Batch = list[dict]  # the manifest's records of its images
StepCallback = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Sampler:
    """From prompts and seeds to latents and images, by one solver on the nodes `sigmas` of one backbone."""

    backend: Backend
    solver: Solver
    solver_name: str
    sigmas: Tensor
    guidance_scale: float
    finish: str = "none"
    predictor: Path | None = None
    evaluator: ParallelEvaluator = field(default_factory=ParallelEvaluator)

    @cached_property
    def cost(self) -> Tableau:
        """The compiled tableau, off which serial depth and NFE are read."""
        return compile_tableau(self.solver, self.sigmas, self.finish)

    @property
    def cfg_rows(self) -> int:
        """Network rows of an evaluation: 2 where CFG needs the unconditional output as well."""
        return 2 if self.guidance_scale != 1 and self.backend.cfg_doubles_rows else 1

    @property
    def steps(self) -> int:
        """How many states the solver goes through."""
        return self.solver.num_steps(self.sigmas)

    def settings(self) -> dict:
        """What the manifest records of every image."""
        path = self.predictor
        return {
            "solver": self.solver_name,
            "predictor": None if path is None else hashlib.sha256(path.read_bytes()).hexdigest(),
            "nodes": self.sigmas.tolist(),
            "depth": self.cost.depth,
            "evaluations": self.cost.evaluations,
            "guidance": self.guidance_scale,
            "guidance_rows": self.cfg_rows,
            "finish": self.finish,
            "backbone": f"{self.backend.name}: {self.backend.identity()}",
            "weights": self.backend.image_fingerprint(),
            "config": self.backend.image_options(),
            "dtype": str(self.backend.dtype).removeprefix("torch."),
        }

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], callback: StepCallback | None = None
    ) -> Tensor:
        """Final latents [B, C, H, W] of B prompts and seeds; callback(n, x) sees those after step n."""
        with torch.inference_mode():
            condition = self.backend.encode(prompts, self.guidance_scale)
            velocity = self.evaluator.velocity(self.backend, condition)
            x = self.backend.initial_latents(seeds, self.sigmas[0])
            return sample(self.solver, velocity, x, self.sigmas, callback, self.finish)

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], callback: StepCallback | None = None
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of B prompts and seeds."""
        with torch.inference_mode():
            return self.backend.decode(self.latents(prompts, seeds, callback))


def run_request(
    request: SamplingRequest, seeds: list[int], prompts: PromptOptions, device: str | None, output: Output
) -> None:
    """Make the images of a command line and print what they cost."""
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise UserError(f"--guidance {request.guidance}: expected a finite number")
    with process_group(device) as ranks:
        if ranks.world > 1:
            install_sigterm_handler()
        resolved = resolve(request)
        for text in resolved.notes:
            note(f"{resolved.path}: {text}")
        texts = prompts.read(resolved.spec)
        sampler = make_sampler(resolved, ranks)
        output = replace(output, outdir=output.outdir or default_outdir(sampler))
        report(describe(sampler, resolved), ranks)
        generate(sampler, texts, seeds, output, ranks)
        report(f"{len(seeds)} images in {output.outdir}", ranks)


def report(text: str, ranks: Ranks) -> None:
    """Print a line once for all ranks."""
    if ranks.rank == 0:
        click.echo(text)


def default_outdir(sampler: Sampler) -> Path:
    """samples/BACKEND/SOLVER-depthD-evalsE."""
    cost = sampler.cost
    name = f"{sampler.solver_name}-depth{cost.depth}-evals{cost.evaluations}"
    return Path("samples", sampler.backend.name, name)


def describe(sampler: Sampler, resolved: ResolvedRequest) -> str:
    """Solver, predictor, cost and guidance in a line."""
    cost, scale = sampler.cost, sampler.guidance_scale
    rows = "2 rows" if sampler.cfg_rows == 2 else "1 row"
    guidance = "" if scale == 1 else f", guidance {scale:g} (each evaluation on {rows})"
    source = "" if resolved.path is None else f" from {resolved.path}"
    nfe = f"serial depth {cost.depth}, {cost.evaluations} evaluations an image"
    return f"{sampler.solver_name}{source}: {nfe}{guidance}"


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
    if ranks.world > 1:
        check_same(ranks, settings_of_run(sampler, prompts, seeds, output))
    with locked_by_run(output.outdir, ranks):
        manifest = Manifest(output.outdir, ranks.rank, sampler.settings())
        batches = make_batches(prompts, seeds, output, manifest.settings)
        missing = [
            i for i, batch in enumerate(batches) if not is_complete(manifest, i, batch, output, sampler.steps)
        ]
        ranks.barrier()  # every rank has read the parts of an earlier run
        todo = [(i, batches[i]) for i in ranks.broadcast(missing)]
        merge(manifest, ranks)
        sampler.backend.note_truncated([record["prompt"] for _, batch in todo for record in batch])
        ranks.barrier()
        made = write_batches(sampler, todo, output, manifest, ranks)
        ranks.barrier()
        ranks.on_first(lambda: check_complete(output.outdir, *merged(manifest, seeds, output)))
    return made


def settings_of_run(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], output: Output) -> dict:
    """What must be the same on all ranks, by its name in messages."""
    written = {k: v for k, v in vars(output).items() if k != "outdir"}
    parallel = [sampler.evaluator.ranks is not None, sampler.evaluator.branches]
    return {
        **sampler.settings(),
        "weights": sampler.backend.fingerprint(),
        "prompts": list(prompts),
        "seeds": list(seeds),
        "output options": written,
        "--parallel": parallel,
    }


def merged(manifest: Manifest, seeds: Sequence[int], output: Output) -> tuple[int, int]:
    """Gather the ranks' parts; how many images are asked for, and how many of them are recorded and there."""
    Manifest.merge(manifest.outdir)
    wanted = {output.name(seed) for seed in seeds}
    recorded = {r["file"] for r in read_records(manifest.outdir / NAME)} & wanted
    return len(wanted), sum((manifest.outdir / name).is_file() for name in recorded)


def make_batches(prompts: Sequence[str], seeds: Sequence[int], output: Output, settings: dict) -> list[Batch]:
    """The records of all images, batch by batch."""
    records = [
        {"file": output.name(s), "seed": s, "prompt": output.prompt(prompts, i, s)} | settings
        for i, s in enumerate(seeds)
    ]
    return [records[i : i + output.batch] for i in range(0, len(records), output.batch)]


def is_complete(manifest: Manifest, index: int, batch: Batch, output: Output, steps: int) -> bool:
    """Whether all files of a batch are there and whole; an image of another prompt is refused."""
    images = [manifest.has(record) for record in batch]
    extra = [output.grid_path(index)] if output.grid else []
    if output.return_inters:
        extra += [output.inter_path(record["seed"], n) for record in batch for n in range(steps)]
    return all(images) and all(manifest.rank > 0 or holds_image(path) for path in extra)


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
            manifest.add(write_batch(sampler, index, batch, output))
            bar.update(len(batch))
    return 0 if divides_points and ranks.rank > 0 else count


def write_batch(sampler: Sampler, index: int, batch: Batch, output: Output) -> Batch:
    """Make and write the images of one batch, and what goes beside them; returns the records of its files."""

    def save_step(n: int, x: Tensor) -> None:
        for record, image in zip(batch, sampler.backend.decode(x), strict=True):
            save_png(image, output.inter_path(record["seed"], n))

    seeds, prompts = [r["seed"] for r in batch], [r["prompt"] for r in batch]
    latents = sampler.latents(prompts, seeds, save_step if output.return_inters else None)
    check_finite(latents, batch, "latents")
    images = sampler.backend.decode(latents)
    check_finite(images, batch, "decoded images")
    contents = [save_png(x, output.outdir / r["file"]) for r, x in zip(batch, images, strict=True)]
    if output.grid:
        save_png(make_grid(images), output.grid_path(index))
    return [record | content_facts(content) for record, content in zip(batch, contents, strict=True)]


def check_finite(values: Tensor, batch: Batch, what: str) -> None:
    """Refuse to write images of values [B, ...] that are not finite, which would be black: UserError."""
    finite = values.isfinite().flatten(1).all(1).tolist()
    if all(finite):
        return
    record = batch[finite.index(False)]
    raise UserError(
        f"seed {record['seed']}, prompt {record['prompt'][:80]!r}: its {what} are not finite numbers, nor are"
        f" those of {finite.count(False) - 1} others of its batch; nothing was written of it: try --dtype"
        " float32 or bfloat16, a lower --guidance, or another table"
    )


def make_sampler(resolved: ResolvedRequest, ranks: Ranks) -> Sampler:
    """Load the backbone of a resolved request and put its solver on the nodes."""
    spec, request = resolved.spec, resolved.request
    backend = load_backend(spec, ranks.device, None if request.dtype == "auto" else request.dtype)
    sigmas = backend.sigmas(spec) if resolved.sigmas is None else resolved.sigmas
    if resolved.checks_nodes and (text := backend.nodes_note(spec, sigmas)):
        note(text)
    if text := backend.shift_note(spec):
        note(text)
    guidance = backend.default_guidance if spec.guidance_rate is None else spec.guidance_rate
    solver = baseline_of(resolved.name, backend.flow) if resolved.name in BASELINES else resolved.solver
    sampler = Sampler(backend, solver, resolved.name, sigmas, guidance, request.finish, resolved.path)
    return sampler if request.parallel == "images" else divide_points(sampler, request.parallel, ranks)


def divide_points(sampler: Sampler, parallel: str, ranks: Ranks) -> Sampler:
    """The sampler whose points, and with "points-cfg" CFG branches, are divided among the ranks."""
    branches = sampler.cfg_rows if parallel == "points-cfg" else 1
    tasks = branches * max(len(level) for level in sampler.cost.levels)
    useful = -(
        -tasks // -(-tasks // ranks.world)
    )  # each rank takes as many as the busiest, until none is left
    if ranks.world == 1:
        note(f"--parallel {parallel} has one process: start up to {tasks} with torchrun")
    elif ranks.world > useful:
        note(f"--parallel {parallel} gives work to {useful} of {ranks.world} processes: start {useful}")
    return replace(sampler, evaluator=ParallelEvaluator(ranks if ranks.world > 1 else None, branches == 2))
