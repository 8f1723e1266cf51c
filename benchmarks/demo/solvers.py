"""Part 1: learned solvers against the best classical ones, at equal serial depth and at equal NFE."""

from dataclasses import replace

import click
from tqdm import tqdm

from evaluation.naming import SOLVERS
from generation.generate import Sampler

from ..quality.figures import draw_depth
from ..quality.teacher_reference import sampler_of, schedules_of
from .setting import DEPTH, GUIDANCE, Measured, Setting, error_table

CANDIDATES = ("euler", "ipndm2", "dpmpp", "unipc")
OURS = {"epd": "EPD, shipped", "tableau1": "tableau K=1, shipped", "tableau2": "tableau K=2, shipped"}
PICTURED = 12


def best_baselines(setting: Setting, depth: int) -> list[Sampler]:
    """The classical solvers of a depth, which is their NFE, each on the schedule that suits it best on the
    tuning images, the best first.
    """
    best = []
    for name in CANDIDATES:
        for schedule in schedules_of(setting.backend):
            option = replace(
                sampler_of(setting.backend, GUIDANCE, name, depth, schedule), solver_name=SOLVERS[name]
            )
            best.append((setting.tuning.error(option), len(best), option))
    chosen: dict[str, Sampler] = {}
    for _, _, option in sorted(best):
        chosen.setdefault(option.solver_name, option)
    return list(chosen.values())


def compare_solvers(setting: Setting) -> list[Measured]:
    """Print the comparison and draw its picture; what was measured, the best first."""
    ours = [setting.shipped(kind, name) for kind, name in OURS.items()]
    costs = sorted({sampler.cost.evaluations for sampler in ours} | {DEPTH})
    baselines = {n: best_baselines(setting, n) for n in tqdm(costs, desc="baselines", disable=None)}
    deep = baselines[DEPTH]
    rows = [*ours, *deep[:2], *(baselines[n][0] for n in costs if n != DEPTH)]
    measured = [setting.measure(sampler) for sampler in rows]
    pictured = [*measured[: len(ours) + 2], setting.measure(deep[2])]
    pictures = {"teacher": setting.reference.teacher[1][:PICTURED]}
    pictures |= {m.name: m.samples[1][:PICTURED] for m in sorted(pictured, key=lambda m: m.error)}
    captions = setting.reference.pairs.prompts[:PICTURED]
    path = setting.out / "solvers.png"
    title = f"The same prompts and seeds at serial depth {DEPTH}, guidance {GUIDANCE:g}"
    draw_depth(
        path, pictures, captions, [{**m.row(), "learned": "shipped" in m.name} for m in measured], title
    )
    intervals = setting.reference.intervals
    click.echo(
        f"{error_table(measured)}\n"
        f"The error is the RMSE of latents to DPM-Solver-2 with {intervals} intervals; ± is half a 95 %"
        " interval.\nEach classical solver has the schedule that suits it best on other images; at an NFE"
        f"\nabove {DEPTH} it takes as many calls one after another. Picture: {path}"
    )
    return sorted(measured, key=lambda m: m.error)
