"""Learned and classical solvers at equal serial depth and at equal NFE (network evaluations in all)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from backends import Backend
from digits.data import parse
from digits.judge import Judge
from generation.generate import Sampler
from solvers import BASELINES, UserError, load_predictor
from training.distill.bank import rmse_per_image

from ..report import mean_and_halfwidth, text_table
from .teacher_reference import SCHEDULES, TeacherReference, has_depth, sampler_of

# one evaluation a step: any number of them
SINGLE_EVALUATION = ("euler", "ipndm2", "ipndm3", "ipndm", "dpmpp", "dpmpp3", "unipc", "unipc3")
COSTS = {"depth": "of the same serial depth", "evaluations": "of the same NFE"}
Measured = tuple[dict, Tensor]  # a row, and the error of each image


@dataclass
class MatchedComparison:
    """Learned tables of one guidance, by the names of their files, and the baselines of the same serial depth
    and of the same NFE.
    """

    reference: TeacherReference
    tuning: TeacherReference
    judge: Judge
    kinds: dict[str, str]  # of the tables, by name
    folder: Path
    matched: dict[int, list[Measured]] = field(default_factory=dict)  # baselines by depth, or by NFE

    def rows(self, depths: Sequence[int]) -> list[dict]:
        """Baselines of each depth, then the learned tables, each with paired differences to the best
        baseline.
        """
        guidance = f"guidance {self.reference.guidance:g}"
        for depth in tqdm(depths, desc=f"baselines, {guidance}", disable=None):
            self.matched[depth] = self.baselines([n for n in BASELINES if has_depth(n, depth)], depth)
        learned = [self.learned(name) for name in tqdm(self.kinds, desc=f"learned, {guidance}", disable=None)]
        measured: list[Measured] = []
        for depth in depths:
            measured += [*self.matched[depth], *[(r, e) for r, e in learned if r["depth"] == depth]]
        for nfe in sorted(set(self.matched) - set(depths)):
            measured += self.matched[nfe]
        return [self.compared(row, errors) for row, errors in measured]

    def baselines(self, names: Sequence[str], depth: int) -> list[Measured]:
        """Baselines of a depth, each on the schedule with the least error on the tuning seeds."""
        backend, guidance = self.reference.backend, self.reference.guidance
        measured = []
        for name in names:
            samplers = [sampler_of(backend, guidance, name, depth, schedule) for schedule in SCHEDULES]
            errors = [self.tuning.error(sampler) for sampler in samplers]
            best = errors.index(min(errors))
            measured.append(self.measure(name, samplers[best], SCHEDULES[best]))
        return measured

    def learned(self, name: str) -> Measured:
        """A learned table; the baselines of its NFE are measured if they are not yet."""
        path = self.folder / f"{name}.pkl"
        sampler = learned_sampler(self.reference.backend, self.reference.guidance, path)
        row, errors = self.measure(self.kinds[name], sampler, "learned")
        if row["evaluations"] not in self.matched:
            self.matched[row["evaluations"]] = self.baselines(SINGLE_EVALUATION, row["evaluations"])
        return row, errors

    def measure(self, name: str, sampler: Sampler, schedule: str) -> Measured:
        """The row of a solver, and its errors image by image."""
        latents, images, _ = self.reference.sample(sampler)
        errors = rmse_per_image(latents, self.reference.teacher[0])
        verdict = self.judge(images, [parse(p) for p in self.reference.pairs.prompts])
        row = {
            "solver": name,
            "guidance": self.reference.guidance,
            "schedule": schedule,
            "depth": sampler.cost.depth,
            "evaluations": sampler.cost.evaluations,
        }
        for key, values in (
            ("rmse", errors),
            ("pixels", rmse_per_image(images, self.reference.teacher[1])),
            ("digit_and_colour", verdict.digit_and_colour),
        ):
            row[key], row[f"{key}_halfwidth"] = mean_and_halfwidth(values)
        return row | {"frechet_percent": self.judge.frechet(verdict.features)}, errors

    def compared(self, row: dict, errors: Tensor) -> dict:
        """A row with its error over that of the best baseline of its depth, and of its NFE."""
        return row | {
            f"same_{cost}": over_best(row, errors, self.matched[row[cost]])
            for cost in COSTS
            if row[cost] in self.matched
        }


def over_best(row: dict, errors: Tensor, baselines: Sequence[Measured]) -> dict:
    """The best of some baselines, and the ratio and paired difference of a row's errors to it."""
    best, best_errors = min(baselines, key=lambda baseline: baseline[0]["rmse"])
    difference, halfwidth = mean_and_halfwidth(errors - best_errors)
    return {
        "solver": best["solver"],
        "schedule": best["schedule"],
        "rmse": best["rmse"],
        "ratio": row["rmse"] / best["rmse"],
        "difference": difference,
        "difference_halfwidth": halfwidth,
    }


def learned_sampler(backend: Backend, guidance: float, path: Path) -> Sampler:
    """The sampler of a distilled predictor."""
    predictor = load_predictor(path)
    if predictor.spec.guidance_rate != guidance:
        raise UserError(f"{path} was made for guidance {predictor.spec.guidance_rate}, not {guidance}")
    return Sampler(backend, predictor.solver(), path.stem, predictor.sigmas, guidance)


HEADER = [
    "guidance",
    "solver",
    "schedule",
    "depth",
    "NFE",
    "RMSE to teacher",
    "x best of same depth",
    "x best of same NFE",
    "pixels",
    "digit+colour %",
    "Frechet %",
]


def over(row: dict, cost: str) -> str:
    """A row's error over that of the best baseline of the same cost, with half a 95 % interval of the paired
    difference.
    """
    if f"same_{cost}" not in row:
        return ""
    best = row[f"same_{cost}"]
    return f"{best['ratio']:.2f} ± {best['difference_halfwidth'] / best['rmse']:.2f}"


def cells_of(row: dict) -> list[str]:
    """A row of the printed table."""
    return [
        f"{row['guidance']:g}",
        row["solver"],
        row["schedule"],
        str(row["depth"]),
        str(row["evaluations"]),
        f"{row['rmse']:.4f} ± {row['rmse_halfwidth']:.4f}",
        over(row, "depth"),
        over(row, "evaluations"),
        f"{row['pixels']:.4f}",
        f"{100 * row['digit_and_colour']:.1f}",
        f"{row['frechet_percent']:.2f}",
    ]


def headline(rows: list[dict], guidance: float, kinds: Mapping[str, str]) -> str:
    """A line for each depth of one guidance: errors over the best baseline at equal depth and at
    equal NFE.
    """
    lines = []
    for depth in sorted({r["depth"] for r in rows if r["solver"] in kinds.values()}):
        here = {r["solver"]: r for r in rows if (r["guidance"], r["depth"]) == (guidance, depth)}
        best = here[next(iter(kinds.values()))]["same_depth"]
        line = [str(depth), f"{best['solver']} {best['rmse']:.3f}"]
        for kind in kinds.values():
            row = here[kind]
            ratios = [f"{row[f'same_{cost}']['ratio']:.2f}" for cost in COSTS]
            line.append(f"{ratios[0]} / {ratios[1]} ({row['evaluations']})")
        lines.append(line)
    header = ["depth", "best baseline, RMSE", *[f"{name} (NFE)" for name in kinds]]
    return text_table(header, lines, text_columns=2)


def summary(rows: list[dict], kinds: Sequence[str], cost: str) -> str:
    """A line for each guidance and depth: learned solvers over the best baseline of the same cost."""
    lines = []
    for guidance, depth in sorted({(r["guidance"], r["depth"]) for r in rows if r["solver"] in kinds}):
        here = {r["solver"]: r for r in rows if (r["guidance"], r["depth"]) == (guidance, depth)}
        line = [f"{guidance:g}", str(depth)]
        if cost == "depth":
            best = here[kinds[0]]["same_depth"]
            line.append(f"{best['solver']} ({best['schedule']}) {best['rmse']:.4f}")
        lines.append(line + [f"{over(here[k], cost)} ({here[k]['evaluations']})" for k in kinds])
    best_header = ["best baseline, its RMSE"] if cost == "depth" else []
    header = ["guidance", "depth", *best_header, *[f"{k} (NFE)" for k in kinds]]
    table = text_table(header, lines, text_columns=len(best_header) + 2)
    return f"Error over that of the best baseline {COSTS[cost]}:\n\n{table}\n"
