"""Our samplers against diffusers' pipelines at the same serial depth, in time and quality.

    python -m benchmarks.speed.pipelines

Both have the same networks, prompts, noise, guidance and machine, encode the text anew each time and end with
images in memory.
"""

from collections.abc import Sequence

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
from solvers import Spec

from ..options import names, numbers
from ..quality.compare_solvers import FIRST_SEED, TUNING_IMAGES, TUNING_SEED
from ..quality.teacher_reference import PromptSeeds
from ..report import mean_and_halfwidth, result_path, text_table, write_json
from .diffusers_baseline import SCHEDULERS
from .full_size import in_memory
from .networks import Networks, device_option, free, out_option, resolution_option
from .pipeline_samplers import Contest, FineSolution, PipelineSampler
from .timing import in_turn, ratio, shown, spread

FAMILIES = {"ldm": LDM, "sd3": SD3, "flux": Flux}
GUIDANCE = {"ldm": 7.5, "sd3": 4.5, "flux": 3.5}
DEPTHS = {"ldm": "4,6,8,10", "sd3": "4", "flux": "4"}
NOTE = (
    "Network calls one after the other and NFE: diffusers / ours. Both encode the texts anew each time and"
    " leave images in memory. Time: median of paired repeats and its 95 % interval. RMSE: to a fine solver, ±"
    " half a 95 % interval."
)
HEADER = ["family", "diffusers (schedule)", "ours (schedule)", "calls", "NFE"]
QUALITY = ["RMSE of diffusers", "our RMSE", "ours - diffusers"]


def seconds(
    samplers: list[PipelineSampler], prompts: Sequence[str], repeats: int, device: torch.device
) -> Tensor:
    """Seconds [samplers, repeats] from a batch of prompts to its images, the samplers in turn."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + len(prompts)))
    return in_turn([lambda s=s: s.images(prompts, seeds) for s in samplers], repeats, device)


def quality(diffusers: Tensor, own: Tensor) -> dict[str, float]:
    """RMSE of both samplers and of ours less diffusers', image by image."""
    row = {}
    for name, values in (("their_rmse", diffusers), ("our_rmse", own), ("rmse_difference", own - diffusers)):
        row[name], row[f"{name}_halfwidth"] = mean_and_halfwidth(values)
    return row


def compare(contest: Contest, depth: int, batches: list[int], repeats: int) -> list[dict]:
    """A row for each batch, each scheduler of diffusers', and ours: the solver of the same name and the
    tables.
    """
    diffusers, own = contest.diffusers_samplers(depth), contest.own_samplers(depth)
    samplers = [sampler for _, sampler in [*diffusers.values(), *own.values()]]
    costs = [contest.costs(sampler) for sampler in samplers]
    errors = [] if contest.heldout is None else [contest.heldout.errors(sampler) for sampler in samplers]
    device = contest.backend.device
    times = {b: seconds(samplers, evaluation_prompts(b, ALL_LABELS), repeats, device) for b in batches}
    pairs = [(d, o) for d in diffusers for o in own if o == d or o not in SCHEDULERS]
    rows = []
    for batch, (d, o) in [(b, pair) for b in batches for pair in pairs]:
        i, j = list(diffusers).index(d), len(diffusers) + list(own).index(o)
        row = {
            "family": contest.family,
            "theirs": samplers[i].name,
            "their_schedule": diffusers[d][0],
            "ours": samplers[j].name,
            "our_schedule": own[o][0],
            "depth": depth,
            "batch": batch,
            **ratio(times[batch][j], times[batch][i]),
            **{f"their_{k}": v for k, v in costs[i].items()},
            **{f"our_{k}": v for k, v in costs[j].items()},
            "their_ms_per_image": 1000 * times[batch][i].median().item() / batch,
            **(quality(errors[i], errors[j]) if errors else {}),
        }
        rows.append(row)
    return rows


def table(rows: list[dict], batches: list[int]) -> str:
    """A line for each pair of samplers and depth; calls and NFE are diffusers / ours."""
    lines = []
    measured = "our_rmse" in rows[0]
    for pair in dict.fromkeys((r["family"], r["theirs"], r["ours"], r["depth"]) for r in rows):
        of_pair = [r for r in rows if (r["family"], r["theirs"], r["ours"], r["depth"]) == pair]
        row, scheduler = of_pair[0], pair[1].split(", ")[1].removesuffix("Scheduler")
        line = [
            row["family"],
            f"{scheduler} ({row['their_schedule']})",
            f"{row['ours']} ({row['our_schedule']})",
            f"{row['their_calls']} / {row['our_calls']}",
            f"{row['their_evaluations']} / {row['our_evaluations']}",
            *map(shown, of_pair),
        ]
        if measured:
            line += [f"{row[k]:.4f} ± {row[f'{k}_halfwidth']:.4f}" for k in ("their_rmse", "our_rmse")]
            line.append(f"{row['rmse_difference']:+.4f} ± {row['rmse_difference_halfwidth']:.4f}")
        lines.append(line)
    times = [f"time, ours / diffusers, batch {b}" for b in batches]
    return text_table(HEADER + times + (QUALITY if measured else []), lines, text_columns=3)


def summary(rows: list[dict]) -> str:
    """A line for each of our samplers: its ratios over families, depths and both schedulers."""
    lines, batches = [], list(dict.fromkeys(r["batch"] for r in rows))
    measured = "our_rmse" in rows[0]
    for ours in sorted(dict.fromkeys(r["ours"] for r in rows), key=lambda name: name not in SCHEDULERS):
        own = [r for r in rows if r["ours"] == ours]
        families = ", ".join(dict.fromkeys(r["family"] for r in own))
        line = [ours, families, f"{own[0]['our_evaluations'] / own[0]['their_evaluations']:g}"]
        line += [spread([r["ratio"] for r in own if r["batch"] == b]) for b in batches]
        if measured:
            line.append(spread([r["our_rmse"] / r["their_rmse"] for r in own]))
        lines.append(line)
    times = [f"time, ours / diffusers, batch {b}" for b in batches]
    header = ["ours", "families", "NFE, ours / diffusers", *times]
    return text_table(header + ["RMSE, ours / diffusers"] * measured, lines, text_columns=2)


def full_size(family: str, networks: Networks, device: torch.device) -> PipelineBackend:
    """The full-size architecture with random weights, in half precision on an accelerator."""
    dtype = resolve_dtype(None, device, find_family(family))
    pixels = networks.resolution or (512 if family == "ldm" else 1024)
    pipe = in_memory(family, networks.layers, pixels, device, dtype)
    return FAMILIES[family](pipe, device, {"model_name_or_path": "random weights"}, family)


def digits(family: str, count: int, intervals: int, device: torch.device) -> Contest:
    """The digits backbone of a family, with a fine solver's latents for the schedules and for the errors."""
    backend = load_backend(Spec(backend="digits", backend_config={"family": family}), device)
    tuning, heldout = (
        FineSolution.make(backend, GUIDANCE[family], PromptSeeds.evaluation(n, first), intervals)
        for n, first in ((TUNING_IMAGES, TUNING_SEED), (count, FIRST_SEED))
    )
    return Contest(backend, family, GUIDANCE[family], tuning, heldout)


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
        if full:
            contest = Contest(full_size(family, networks, device), family, GUIDANCE[family])
        else:
            contest = digits(family, count, intervals, device)
        for depth in tqdm(numbers("--depths", depths or DEPTHS[family]), desc=family, disable=None):
            rows += compare(contest, depth, sizes, repeats)
        del contest
        free(device)
        write_json(result_path("pipelines", networks.kind, out), settings, rows, device)
    click.echo(f"{NOTE}\n\n{table(rows, sizes)}\n\n{summary(rows)}")


if __name__ == "__main__":
    run_command(main)
