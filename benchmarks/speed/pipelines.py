"""Our samplers against diffusers' pipelines at the same serial depth, in time and quality.

    python -m benchmarks.speed.pipelines

Both have the same networks, prompts, noise, guidance and machine, encode the text anew each time and end with
images in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor
from tqdm import tqdm

from backends import find_family, load_backend, resolve_dtype
from backends.diffusers_pipeline import PipelineBackend
from backends.flux import Flux
from backends.ldm import LDM
from backends.sd3 import SD3
from common.errors import run_command
from digits.data import ALL_LABELS, evaluation_prompts
from generation.generate import Sampler
from solvers import Spec
from training.distill.bank import rmse_per_image

from ..quality.compare_solvers import FIRST_SEED, TUNING_IMAGES, TUNING_SEED, names, numbers
from ..quality.teacher_reference import sampler_of, schedules_of, shipped, teacher_sampler
from ..report import mean_and_halfwidth, result_path, text_table, write_json
from .diffusers_baseline import SCHEDULERS, Theirs
from .full_size import in_memory
from .networks import Networks, device_option, free, out_option, resolution_option
from .timing import in_turn, ratio, shown, spread

FAMILIES = {"ldm": LDM, "sd3": SD3, "flux": Flux}
GUIDANCE = {"ldm": 7.5, "sd3": 4.5, "flux": 3.5}
DEPTHS = {"ldm": "4,6,8,10", "sd3": "4", "flux": "4"}
LEARNED = ("epd distilled", "tableau1 distilled", "wide2 distilled")


@dataclass(frozen=True)
class Ours:
    """A sampler that encodes its prompts anew each time, as diffusers' pipelines do."""

    sampler: Sampler

    @property
    def name(self) -> str:
        return self.sampler.solver_name

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.sampler.backend.forget_prompts()
        return self.sampler.images(prompts, seeds)

    def latents(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return self.sampler.latents(prompts, seeds)


Side = Ours | Theirs


@dataclass(frozen=True)
class Exam:
    """Prompts, seeds and a fine solver's final latents of them: at the last noise level, where ours end, and
    at 0, where theirs do.
    """

    prompts: list[str]
    seeds: list[int]
    batch: int
    at_end: Tensor
    at_zero: Tensor

    @classmethod
    def make(
        cls, backend: PipelineBackend, guidance: float, n: int, first_seed: int, batch: int, intervals: int
    ) -> "Exam":
        prompts, seeds = evaluation_prompts(n, ALL_LABELS), list(range(first_seed, first_seed + n))
        teacher = replace(teacher_sampler(backend, guidance, intervals), finish="denoise")
        ends, zeros = [], []
        for i in range(0, n, batch):
            states: dict[int, Tensor] = {}
            zeros.append(teacher.latents(prompts[i : i + batch], seeds[i : i + batch], states.__setitem__))
            ends.append(states[max(states)])
        return cls(prompts, seeds, batch, torch.cat(ends), torch.cat(zeros))

    def errors(self, side: Side) -> Tensor:
        """RMSE to the fine solver, image by image."""
        parts = [slice(i, i + self.batch) for i in range(0, len(self.seeds), self.batch)]
        found = torch.cat([side.latents(self.prompts[p], self.seeds[p]) for p in parts])
        return rmse_per_image(found, self.at_zero if isinstance(side, Theirs) else self.at_end).cpu()

    def nearest(self, candidates: dict[str, Side]) -> str:
        """The candidate that comes nearest to the fine solver."""
        return min(candidates, key=lambda name: self.errors(candidates[name]).mean().item())


def their_sides(
    backend: PipelineBackend, guidance: float, depth: int, tuning: Exam | None
) -> dict[str, tuple[str, Side]]:
    """diffusers' schedulers by name, each with the times that suit it best on the tuning seeds, else those of
    the model's configuration.
    """
    found = {}
    for name in SCHEDULERS:
        candidates: dict[str, Side] = {
            s: Theirs(backend, name, s, depth, guidance) for s in Theirs.spacings(backend)
        }
        best = next(iter(candidates)) if tuning is None else tuning.nearest(candidates)
        found[name] = (best, candidates[best])
    return found


def our_sides(
    backend: PipelineBackend, family: str, depth: int, tuning: Exam | None
) -> dict[str, tuple[str, Side]]:
    """Our solvers of the same names, on nodes chosen in the same way, and tables: the learned ones, or equal
    points where none is.
    """
    guidance, found = GUIDANCE[family], {}
    for name in SCHEDULERS:
        candidates: dict[str, Side] = {
            s: Ours(sampler_of(backend, guidance, name, depth, s)) for s in schedules_of(backend)
        }
        best = backend.default_schedule if tuning is None else tuning.nearest(candidates)
        found[name] = (best, candidates[best])
    if tuning is None:
        own = backend.default_schedule
        return found | {"epd": (own, Ours(sampler_of(backend, guidance, "epd-start", depth, own)))}
    learned = shipped(backend, family, guidance, depth)
    return found | {k: ("learned", Ours(learned[k])) for k in LEARNED if k in learned}


def evaluations(backend: PipelineBackend, side: Side, doubled: int) -> dict[str, int]:
    """How often an image calls the network, and its rows in all these calls, two of which are one evaluation
    under guidance.
    """
    rows: list[int] = []
    network = next(v for k, v in backend.networks().items() if k in ("unet", "transformer"))
    hook = network.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    try:
        side.images(evaluation_prompts(1, ALL_LABELS), [FIRST_SEED])
    finally:
        hook.remove()
    return {"calls": len(rows), "evaluations": sum(rows) // doubled}


def seconds(contest: list[Side], prompts: Sequence[str], repeats: int, device: torch.device) -> Tensor:
    """Seconds [sides, repeats] from a batch of prompts to its images, all taking turns."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + len(prompts)))
    return in_turn([lambda side=side: side.images(prompts, seeds) for side in contest], repeats, device)


def quality(theirs: Tensor, ours: Tensor) -> dict:
    """RMSE of both sides and of ours less theirs, image by image."""
    found = {}
    for name, values in (("their_rmse", theirs), ("our_rmse", ours), ("rmse_difference", ours - theirs)):
        found[name], found[f"{name}_halfwidth"] = mean_and_halfwidth(values)
    return found


def compare(
    backend: PipelineBackend, family: str, depth: int, batches: list[int], repeats: int, exams: list[Exam]
) -> list[dict]:
    """A row for each batch, each scheduler of theirs, and ours: the solver of the same name and the tables.

    `exams`: where schedules are chosen and where errors are measured, or none.
    """
    guidance = GUIDANCE[family]
    theirs = their_sides(backend, guidance, depth, exams[0] if exams else None)
    ours = our_sides(backend, family, depth, exams[0] if exams else None)
    contest = [side for _, side in [*theirs.values(), *ours.values()]]
    doubled = 2 if guidance != 1 and backend.cfg_doubles_rows else 1
    costs = [evaluations(backend, side, doubled) for side in contest]
    errors = [exams[1].errors(side) for side in contest] if exams else []
    took = {b: seconds(contest, evaluation_prompts(b, ALL_LABELS), repeats, backend.device) for b in batches}
    pairs = [(t, o) for t in theirs for o in ours if o == t or o not in SCHEDULERS]
    rows = []
    for batch, (t, o) in [(b, pair) for b in batches for pair in pairs]:
        i, j = list(theirs).index(t), len(theirs) + list(ours).index(o)
        row = {
            "family": family,
            "theirs": contest[i].name,
            "their_schedule": theirs[t][0],
            "ours": contest[j].name,
        }
        row |= {"our_schedule": ours[o][0], "depth": depth, "batch": batch} | ratio(
            took[batch][j], took[batch][i]
        )
        row |= {f"their_{k}": v for k, v in costs[i].items()} | {f"our_{k}": v for k, v in costs[j].items()}
        row["their_ms_per_image"] = 1000 * took[batch][i].median().item() / batch
        rows.append(row | (quality(errors[i], errors[j]) if exams else {}))
    return rows


NOTE = (
    "Network calls one after the other and evaluations in all: theirs / ours. Both encode the texts anew each"
    " time and leave images in memory. Time: median of paired repeats and its 95 % interval. RMSE: to a fine"
    " solver, ± half a 95 % interval."
)
HEADER = ["family", "theirs (schedule)", "ours (schedule)", "calls", "evals"]
QUALITY = ["their RMSE", "our RMSE", "ours - theirs"]


def table(rows: list[dict], batches: list[int]) -> str:
    """A line for each pair of sides and depth; calls and evaluations are theirs / ours."""
    lines = []
    measured = "our_rmse" in rows[0]
    for pair in dict.fromkeys((r["family"], r["theirs"], r["ours"], r["depth"]) for r in rows):
        here = [r for r in rows if (r["family"], r["theirs"], r["ours"], r["depth"]) == pair]
        row, scheduler = here[0], pair[1].split(", ")[1].removesuffix("Scheduler")
        line = [
            row["family"],
            f"{scheduler} ({row['their_schedule']})",
            f"{row['ours']} ({row['our_schedule']})",
        ]
        line += [
            f"{row['their_calls']} / {row['our_calls']}",
            f"{row['their_evaluations']} / {row['our_evaluations']}",
        ]
        line += [shown(r) for r in here]
        if measured:
            line += [f"{row[k]:.4f} ± {row[f'{k}_halfwidth']:.4f}" for k in ("their_rmse", "our_rmse")]
            line.append(f"{row['rmse_difference']:+.4f} ± {row['rmse_difference_halfwidth']:.4f}")
        lines.append(line)
    times = [f"time, ours / theirs, batch {b}" for b in batches]
    return text_table(HEADER + times + (QUALITY if measured else []), lines, text_columns=3)


def summary(rows: list[dict]) -> str:
    """A line for each of our samplers: its ratios over families, depths and both schedulers."""
    lines, batches = [], list(dict.fromkeys(r["batch"] for r in rows))
    for ours in sorted(dict.fromkeys(r["ours"] for r in rows), key=lambda name: name not in SCHEDULERS):
        here = [r for r in rows if r["ours"] == ours]
        line = [
            ours,
            ", ".join(dict.fromkeys(r["family"] for r in here)),
            f"{here[0]['our_evaluations'] / here[0]['their_evaluations']:g}",
        ]
        line += [spread([r["ratio"] for r in here if r["batch"] == b]) for b in batches]
        lines.append(
            line
            + ([spread([r["our_rmse"] / r["their_rmse"] for r in here])] if "our_rmse" in here[0] else [])
        )
    header = [
        "ours",
        "families",
        "evals, ours / theirs",
        *[f"time, ours / theirs, batch {b}" for b in batches],
    ]
    return text_table(
        header + (["RMSE, ours / theirs"] if "our_rmse" in rows[0] else []), lines, text_columns=2
    )


def full_size(
    family: str, layers: int | None, resolution: int | None, device: torch.device
) -> PipelineBackend:
    """The full-size architecture with random weights, in half precision on an accelerator."""
    dtype = resolve_dtype(None, device, find_family(family))
    pipe = in_memory(family, layers, resolution or (512 if family == "ldm" else 1024), device, dtype)
    return FAMILIES[family](pipe, device, {"model_name_or_path": "random weights"}, family)


@click.command()
@click.option("--families", default="all", show_default=True, help=f"Some of {','.join(FAMILIES)}.")
@click.option("--depths", help="Serial depths, even; by default 4,6,8,10 for ldm and 4 for the others.")
@click.option("--batches", default="1,4", show_default=True)
@click.option("--repeats", type=click.IntRange(2), default=31, show_default=True)
@click.option(
    "--n", "count", type=click.IntRange(2), default=64, show_default=True, help="Images for the RMSE."
)
@click.option(
    "--intervals", type=click.IntRange(2), default=64, show_default=True, help="Of the fine solver."
)
@click.option(
    "--full", is_flag=True, help="Full-size architectures with random weights instead of digits; times only."
)
@click.option(
    "--layers",
    type=click.IntRange(1),
    help="With --full: of the transformers and the text encoders; all by default.",
)
@resolution_option
@device_option
@out_option
def main(families, depths, batches, repeats, count, intervals, full, layers, resolution, device, out) -> None:
    """Time and quality of our samplers and of diffusers' pipelines at the same number of network calls one
    after the other.
    """
    rows, sizes = [], numbers("--batches", batches)
    networks = Networks(full, None, layers, resolution)
    networks.check()
    settings = networks.settings() | {
        "repeats": repeats,
        "n": count,
        "intervals": intervals,
        "tuning_images": TUNING_IMAGES,
    }
    for family in names("--families", families, list(FAMILIES)):
        exams = []
        if full:
            backend = full_size(family, layers, resolution, device)
        else:
            backend = load_backend(Spec(backend="digits", backend_config={"family": family}), device)
            for n, first in ((TUNING_IMAGES, TUNING_SEED), (count, FIRST_SEED)):
                exams.append(Exam.make(backend, GUIDANCE[family], n, first, 64, intervals))
        for depth in tqdm(numbers("--depths", depths or DEPTHS[family]), desc=family, disable=None):
            rows += compare(backend, family, depth, sizes, repeats, exams)
        del backend, exams
        free(device)
        write_json(result_path("pipelines", networks.kind, out), settings, rows, device)
    click.echo(f"{NOTE}\n\n{table(rows, sizes)}\n\n{summary(rows)}")


if __name__ == "__main__":
    run_command(main)
