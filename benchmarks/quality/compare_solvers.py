"""Which solver comes nearest to the exact trajectory at a serial depth.

python -m benchmarks.quality.compare_solvers
"""

from pathlib import Path

import click
from torch import Tensor
from tqdm import tqdm

from backends import load_backend
from common.distributed import process_group
from common.errors import run_command
from digits import FOLDERS
from digits.data import HELD_OUT_LABELS, parse
from digits.judge import Judge
from generation.generate import Sampler
from solvers import Spec
from training.distill.bank import rmse_per_image

from ..options import names, numbers
from ..report import mean_and_halfwidth, text_table, write_json
from .figures import draw
from .teacher_reference import (
    SOLVERS,
    TEACHER_INTERVALS,
    PromptSeeds,
    Samples,
    TeacherReference,
    has_depth,
    sample_all,
    sampler_of,
    schedules_of,
    shipped,
    teacher_sampler,
)

FIRST_SEED = 100_000
TUNING_SEED = 200_000
TUNING_IMAGES = 48
COLUMNS = 16


def measured(sampler: Sampler, samples: Samples, teacher: Tensor, judge: Judge, labels: list) -> dict:
    """One row of the comparison."""
    latents, images, seconds = samples
    verdict = judge(images, labels)
    rmse, rmse_half = mean_and_halfwidth(rmse_per_image(latents, teacher))
    digit, digit_half = mean_and_halfwidth(verdict.digit)
    both, both_half = mean_and_halfwidth(verdict.digit_and_colour)
    return {
        "solver": sampler.solver_name,
        "depth": sampler.cost.depth,
        "evaluations": sampler.cost.evaluations,
        "nodes": len(sampler.sigmas),
        "rmse": rmse,
        "rmse_halfwidth": rmse_half,
        "digit": digit,
        "digit_halfwidth": digit_half,
        "digit_and_colour": both,
        "digit_and_colour_halfwidth": both_half,
        "frechet_percent": judge.frechet(verdict.features),
        "seconds_per_image": seconds,
    }


def cells(row: dict) -> list[str]:
    return [
        row["solver"],
        row["schedule"],
        str(row["depth"]),
        str(row["evaluations"]),
        f"{row['rmse']:.4f} ± {row['rmse_halfwidth']:.4f}",
        f"{100 * row['digit']:.1f} ± {100 * row['digit_halfwidth']:.1f}",
        f"{100 * row['digit_and_colour']:.1f} ± {100 * row['digit_and_colour_halfwidth']:.1f}",
        f"{row['frechet_percent']:.2f}",
        f"{row['seconds_per_image']:.4f}",
    ]


HEADER = [
    "solver",
    "schedule",
    "depth",
    "NFE",
    "RMSE to teacher",
    "digit %",
    "digit+colour %",
    "Frechet %",
    "s/image",
]


def compare(
    reference: TeacherReference,
    tuning: TeacherReference,
    solvers: dict[int, list[str]],
    schedules: list[str],
    learned: dict[int, dict[str, Sampler]],
) -> tuple[list[dict], dict[int, dict[str, Tensor]]]:
    """Rows of the comparison, each solver on the schedule that suits it best on the tuning seeds, and images
    by depth and solver.
    """
    labels, judge = [parse(p) for p in reference.pairs.prompts], Judge(device=reference.backend.device)
    teacher = teacher_sampler(reference.backend, reference.guidance, reference.intervals)
    rows = [{"schedule": "fine"} | measured(teacher, reference.teacher, reference.teacher[0], judge, labels)]
    pictures = {depth: {"teacher": reference.teacher[1][:COLUMNS]} for depth in solvers}
    for depth, name in tqdm([(d, n) for d in solvers for n in solvers[d]], desc="solvers", disable=None):
        candidates = {s: sampler_of(reference.backend, reference.guidance, name, depth, s) for s in schedules}
        best = (
            min(candidates, key=lambda s: tuning.error(candidates[s])) if len(schedules) > 1 else schedules[0]
        )
        samples = reference.sample(candidates[best])
        rows.append(
            {"schedule": best} | measured(candidates[best], samples, reference.teacher[0], judge, labels)
        )
        pictures[depth][name] = samples[1][:COLUMNS]
    for depth, name in [(d, n) for d in learned for n in learned[d]]:
        samples = reference.sample(learned[depth][name])
        rows.append(
            {"schedule": "learned"}
            | measured(learned[depth][name], samples, reference.teacher[0], judge, labels)
        )
        pictures[depth][name] = samples[1][:COLUMNS]
    order = {name: i for i, name in enumerate(dict.fromkeys(r["solver"] for r in rows))}
    return sorted(rows, key=lambda r: (r["rmse"] > 0, r["depth"], order[r["solver"]])), pictures


def teacher_error(reference: TeacherReference, n: int = 32) -> tuple[float, float]:
    """RMSE between the teacher and one with half as many intervals again, on the first n images: mean and
    half width.
    """
    finer = teacher_sampler(reference.backend, reference.guidance, reference.intervals * 3 // 2)
    latents = sample_all(finer, reference.pairs.first(n))[0]
    return mean_and_halfwidth(rmse_per_image(reference.teacher[0][:n], latents))


@click.command()
@click.option(
    "--n", "count", type=click.IntRange(2), default=256, show_default=True, help="Images for each row."
)
@click.option("--depths", default="4,6,8,10", show_default=True)
@click.option("--guidance", type=click.FloatRange(0), help="7.5 for ldm by default, else the family's own.")
@click.option(
    "--family",
    type=click.Choice(list(FOLDERS)),
    default="ldm",
    show_default=True,
    help="Which digits backbone.",
)
@click.option("--solvers", default="all", show_default=True, help=f"Some of {','.join(SOLVERS)}.")
@click.option(
    "--schedule", default="best", show_default=True, help="A schedule, or best: chosen on other seeds."
)
@click.option(
    "--intervals",
    type=click.IntRange(2),
    default=TEACHER_INTERVALS,
    show_default=True,
    help="Of the teacher.",
)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True)
@click.option("--device", help="CUDA where there is one by default.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True)
def main(count, depths, guidance, family, solvers, schedule, intervals, batch, device, out) -> None:
    """Sample digits with every solver from the same prompts and seeds, and hold them against a fine solver
    and the judge.
    """
    depth_list, solver_list = numbers("--depths", depths), names("--solvers", solvers, SOLVERS)
    middle = depth_list[(len(depth_list) - 1) // 2]
    out.mkdir(parents=True, exist_ok=True)
    with process_group(device) as ranks:
        backend = load_backend(
            Spec(backend="digits", backend_config={} if family == "ldm" else {"family": family}), ranks.device
        )
        schedules = (
            schedules_of(backend)
            if schedule == "best"
            else names("--schedule", schedule, schedules_of(backend))
        )
        if guidance is None:
            guidance = 7.5 if family == "ldm" else backend.default_guidance
        tuning_images = TUNING_IMAGES if len(schedules) > 1 else 1
        tuning, reference = (
            TeacherReference.make(backend, guidance, PromptSeeds.evaluation(n, first, batch), intervals)
            for n, first in ((tuning_images, TUNING_SEED), (count, FIRST_SEED))
        )
        learned = {d: shipped(backend, family, guidance, d) for d in depth_list}
        chosen = {d: [name for name in solver_list if has_depth(name, d)] for d in depth_list}
        rows, pictures = compare(reference, tuning, chosen, schedules, learned)
        fineness = teacher_error(reference)
    note = note_of(reference, schedules, fineness[0])
    table = text_table(HEADER, [cells(r) for r in rows], text_columns=2)
    click.echo(f"\n{note}\n\n{table}\n")
    (out / "solvers.md").write_text(f"{note}\n\n{table}\n", encoding="utf-8")
    settings = {
        "family": family,
        "n": count,
        "guidance": guidance,
        "schedules": schedules,
        "batch": batch,
        "teacher_error": fineness[0],
    }
    write_json(out / "solvers.json", settings, rows, backend.device)
    title = f"digits, {family}, guidance {guidance:g}: the same prompts and seeds at serial depth {middle}"
    draw(out / "solvers.png", pictures[middle], rows, title)
    click.echo(f"wrote {out / 'solvers.md'}, {out / 'solvers.json'} and the picture {out / 'solvers.png'}")


def note_of(reference: TeacherReference, schedules: list[str], fineness: float) -> str:
    """What the table compares, in words."""
    unseen = sum(parse(p) in HELD_OUT_LABELS for p in reference.pairs.prompts)
    choice = f"All solvers have {schedules[0]} nodes"
    if len(schedules) > 1:
        choice = (
            f"Each solver has the schedule with which it comes nearest to the teacher on {TUNING_IMAGES}"
            " other seeds"
        )
    doubled = reference.guidance != 1 and reference.backend.cfg_doubles_rows
    return (
        f"{len(reference.pairs.prompts)} prompts and seeds, the same for all rows ({unseen} prompts name"
        f" combinations never trained on). Guidance {reference.guidance:g}: each evaluation is"
        f" {'2 network rows' if doubled else '1 network row'}. No node at 0, no finish. {choice}. ± is half a"
        f" 95 % interval.\nThe teacher is DPM-Solver-2 with {reference.intervals} intervals; it differs by"
        f" RMSE {fineness:.4f} from {reference.intervals * 3 // 2} intervals."
    )


if __name__ == "__main__":
    run_command(main)
