"""What a run costs before anything loads: network rows, the bank on disk, and an estimate of the memory of
weights and activations.
"""

import time
from math import prod

import torch

from backends import DTYPES, SCHEDULES, Backend, Size, check_backend
from common.resolution import image_size
from solvers import BASELINES, Solver, Spec, UserError, num_steps_for_depth, sample

from .distill.config import DistillConfig
from .distill.students import STUDENTS
from .ppo.config import RDPOConfig
from .start import Start

SMALL = {"digits": (4, 8, 8), "gaussian": (4, 8, 8)}  # latents of the embedded backbones, too small to matter
SMALLEST_IMAGE = 128  # pixels a side below which a model is not the published one of its family
BACKWARD_ROWS = 3  # what a row with its backward pass, and perhaps a recomputation, costs in rows without


def latent_elements(spec: Spec) -> int | None:
    """The number of values in an image's latent, from the options alone; None where it is not known."""
    if spec.backend in SMALL:
        return prod(SMALL[spec.backend])
    size, options = size_of(spec)
    if size is None:
        return None
    width, height = image_size(options.get("resolution", size.resolution))
    return size.channels * (width // 8) * (height // 8)


def size_of(spec: Spec) -> tuple[Size | None, dict]:
    """The published sizes of a spec's family, None for one without or for images too small for the published
    model, and the options of its backbone.
    """
    family, options = check_backend(spec)
    side = max(image_size(options.get("resolution", SMALLEST_IMAGE)))
    small = spec.backend in SMALL or side < SMALLEST_IMAGE
    return None if small else family.size, options


def rows_an_evaluation(spec: Spec) -> int:
    """How many network rows an evaluation of one image takes: two with guidance by a doubled batch."""
    return 1 if spec.guidance_rate == 1 or not check_backend(spec)[0].backend.cfg_doubles_rows else 2


def evaluations(solver: Solver, num_steps: int) -> int:
    """The evaluations of a solver on so many nodes."""
    count = 0

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += len(x)
        return torch.zeros_like(x)

    sample(solver, velocity, torch.zeros(1, 1), torch.linspace(2, 1, num_steps, dtype=torch.float64))
    return count


def memory_text(spec: Spec, dtype: str, rows: int, kept: str) -> str | None:
    """The memory of weights and of a network call in words; None where the backbone's sizes are not known.

    Args:
        spec: names the backbone.
        dtype: of its networks; "auto" leaves it to the backbone's options.
        rows: in a call.
        kept: the field of Size that holds the activations of a row.
    """
    size, options = size_of(spec)
    if size is None:
        return None
    chosen = options.get("torch_dtype", "auto") if dtype == "auto" else dtype
    width = 2 if chosen == "auto" else DTYPES[chosen].itemsize  # auto has 16 bits on a GPU
    encoders = 0.0 if options.get("offload") else size.encoders
    pixels = prod(image_size(options.get("resolution", size.resolution)))
    row = vars(size)[kept] * width / 2 * pixels / size.resolution**2
    total = width * (size.network + encoders) + rows * row
    return (
        f"estimate of memory at {8 * width} bits: {total:.0f} GB = weights {width * size.network:.1f} GB of"
        f" the network and {width * encoders:.1f} GB of text encoders + activations of {rows} rows of"
        f" {row:.2g} GB in a call"
    )


def baseline_rows(config: DistillConfig, depths: set[int], flow: bool) -> int:
    """Evaluations of all baselines of some serial depths: on the tuning pairs with each schedule, with the
    best on the held-out pairs.
    """
    settings, not_fitting, total = config.evaluation, "discrete" if flow else "flowmatch", 0
    schedules = [name for name in settings.schedules or SCHEDULES if name != not_fitting]
    for name in settings.baselines if schedules else []:
        for depth in depths:
            try:
                cost = evaluations(BASELINES[name], num_steps_for_depth(BASELINES[name], depth))
            except UserError:
                continue  # this solver has no such depth
            total += cost * (settings.tuning_pairs * len(schedules) + config.bank.heldout_pairs)
    return total


def disk_text(config: DistillConfig) -> str | None:
    """The size of the bank in words; None where that of the backbone's latents is not known."""
    spec, bank = config.spec(), config.bank
    pairs, elements = bank.pairs + bank.heldout_pairs, latent_elements(spec)
    if elements is None:
        return None
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    states = pairs * kept * elements * (2 if bank.dtype == "float16" else 4)
    size, _ = size_of(spec)
    return (
        (f"bank on disk: {states / 1e9:.3f} GB" if states > 1e8 else f"bank on disk: {states / 1e6:.3f} MB")
        + " of states"
        + (
            ""
            if size is None
            else f" and about {2 * pairs * size.text / 1e9:.2f} GB of text embeddings at 16 bits"
        )
    )


def distill_rows(config: DistillConfig, start: Start | None) -> dict[str, int]:
    """The network rows of each part of a distillation."""
    spec, train, bank = config.spec(), config.train, config.bank
    kept = config.teacher.intervals or config.nodes.num_steps - 1
    per_image, pairs = rows_an_evaluation(spec), bank.pairs + bank.heldout_pairs
    teacher = evaluations(BASELINES[config.teacher.solver], kept * (config.teacher.inner + 1) + 1)
    student = STUDENTS[config.student.kind].cost(config, start)
    measured = 1 + -(-train.steps // config.evaluation.interval)
    depths = {student.depth, *config.evaluation.depths}
    rows = {
        "teacher": pairs * teacher,
        "its check": 2 * teacher * min(config.teacher.check, bank.heldout_pairs),
        "baselines": baseline_rows(config, depths, check_backend(spec)[0].flow),
        "training": train.steps * train.batch * student.evaluations,
        "held-out evaluations": measured * bank.heldout_pairs * student.evaluations,
    }
    return {name: per_image * value for name, value in rows.items()}


def measured_time(config: DistillConfig, start: Start | None, backend: Backend) -> str:
    """An estimate of the time of a whole distillation in words, from one network call of a loaded backbone.

    Args:
        config: of the run.
        start: the predictor of student.start, where that names one.
        backend: its backbone; its text encoders are not freed.
    """
    batch = config.train.chunk
    count = distill_rows(config, start)
    velocity = backend.velocity(backend.encode(["a photograph"] * batch, config.guidance_scale))
    sigma = torch.tensor(backend.sigma_max, dtype=torch.float64, device=backend.device)
    x = backend.initial_latents(range(batch), sigma)
    for _ in range(2):  # the first call prepares
        before = time.perf_counter()
        with torch.no_grad():
            velocity(x, sigma).sum().item()  # waits for the device
        seconds = time.perf_counter() - before
    row = seconds / (batch * rows_an_evaluation(config.spec()))
    minutes = row * (sum(count.values()) + (BACKWARD_ROWS - 1) * count["training"]) / 60
    return (
        f"estimate of time: {minutes:.2g} minutes on one device ({1000 * row:.2g} ms a network row, measured;"
        f" a row of training as {BACKWARD_ROWS})"
    )


def distill_estimates(config: DistillConfig, start: Start | None) -> list[str]:
    """The lines that a dry run of distillation prints on its cost."""
    spec, train = config.spec(), config.train
    count, per_image = distill_rows(config, start), rows_an_evaluation(spec)
    student = STUDENTS[config.student.kind].cost(config, start)
    counted = ", ".join(f"{name} {value}" for name, value in count.items())
    at_once = config.student.num_points if train.parallel_points else 1
    # without checkpointing the activations of all calls of a trajectory are kept
    calls = at_once if train.checkpointing else student.evaluations
    kind = "kept_blocks" if config.backend.block_checkpointing else "kept"
    lines = [
        f"network rows: {sum(count.values())} ({counted}); training has a backward pass too",
        disk_text(config),
        memory_text(spec, config.backend.dtype, train.chunk * calls * per_image, kind),
    ]
    return [line for line in lines if line is not None]


def rdpo_estimates(config: RDPOConfig, spec: Spec, start: Start) -> list[str]:
    """The lines that a dry run of RDPO prints on its cost."""
    ppo, per_image = config.ppo, rows_an_evaluation(spec)
    cost = start.predictor.cost().evaluations
    measured = -(-ppo.steps // config.evaluation.interval)
    learned = ppo.steps * ppo.rollout_batch_size * cost * per_image
    shown = min(config.logging.validation_images, config.evaluation.images)
    held_out = (1 + measured) * (config.evaluation.images + shown) * cost * per_image
    lines = [f"network rows: {learned + held_out} (rollouts {learned}, held-out evaluations {held_out})"]
    points = max(map(len, start.predictor.cost().levels))
    memory = memory_text(spec, "auto", ppo.rollout_chunk * points * per_image, "passing")
    return lines + ([] if memory is None else [f"{memory}, and the reward's own"])
