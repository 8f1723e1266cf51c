"""The grid of learned and classical solvers at equal serial depth and at equal total evaluations."""

from collections.abc import Sequence
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
from .teacher_reference import SCHEDULES, Bench, has_depth, sampler_of

SAME_EVALUATIONS = (
    "euler",
    "ipndm2",
    "ipndm3",
    "ipndm",
    "dpmpp",
    "dpmpp3",
    "unipc",
    "unipc3",
)  # one evaluation a step: any number of them
RIVALS = {"depth": "of the same depth", "evaluations": "of as many evaluations"}


@dataclass
class Grid:
    """The measured solvers of one guidance: learned tables by the names of their files, and baselines of
    any depth.
    """

    bench: Bench
    tuning: Bench
    judge: Judge
    cells: dict[str, str]
    folder: Path
    rivals: dict[int, list[tuple[dict, Tensor]]] = field(default_factory=dict)

    def rows(self, depths: Sequence[int]) -> list[dict]:
        """Baselines of each depth, then the learned tables, each with paired differences to the best
        baseline.
        """
        found = []
        for depth in tqdm(depths, desc=f"baselines, guidance {self.bench.guidance:g}", disable=None):
            self.rivals[depth] = self.baselines([n for n in BASELINES if has_depth(n, depth)], depth)
        learned = [self.learned(name) for name in tqdm(self.cells, desc="learned", disable=None)]
        for depth in depths:
            here = [*self.rivals[depth], *[(r, e) for r, e in learned if r["depth"] == depth]]
            found += [self.compared(row, errors) for row, errors in here]
        extra = sorted(set(self.rivals) - set(depths))
        return found + [self.compared(row, errors) for count in extra for row, errors in self.rivals[count]]

    def baselines(self, names: Sequence[str], depth: int) -> list[tuple[dict, Tensor]]:
        """Baselines of a depth, each on the schedule that suits it best on the tuning seeds, and their errors
        image by image.
        """
        found = []
        for name in names:
            options = [sampler_of(self.bench.backend, self.bench.guidance, name, depth, s) for s in SCHEDULES]
            tuned = [self.tuning.error(option) for option in options]
            best = tuned.index(min(tuned))
            found.append(self.measured(name, options[best], SCHEDULES[best]))
        return found

    def learned(self, name: str) -> tuple[dict, Tensor]:
        """A learned table."""
        path = self.folder / f"{name}.pkl"
        sampler = learned_sampler(self.bench.backend, self.bench.guidance, path)
        row, errors = self.measured(self.cells[name], sampler, "learned")
        if row["evaluations"] not in self.rivals:
            self.rivals[row["evaluations"]] = self.baselines(SAME_EVALUATIONS, row["evaluations"])
        return row, errors

    def measured(self, name: str, sampler: Sampler, schedule: str) -> tuple[dict, Tensor]:
        """What is said of a solver, and its errors image by image."""
        latents, images, _ = self.bench.run(sampler)
        errors = rmse_per_image(latents, self.bench.teacher[0])
        verdict = self.judge(images, [parse(p) for p in self.bench.prompts])
        costs = {"depth": sampler.cost.depth, "evaluations": sampler.cost.evaluations}
        row = {"solver": name, "guidance": self.bench.guidance, "schedule": schedule} | costs
        several = {
            "rmse": errors,
            "pixels": rmse_per_image(images, self.bench.teacher[1]),
            "digit_and_colour": verdict.digit_and_colour,
        }
        for key, values in several.items():
            row[key], row[f"{key}_halfwidth"] = mean_and_halfwidth(values)
        return row | {"frechet_percent": self.judge.frechet(verdict.features)}, errors

    def compared(self, row: dict, errors: Tensor) -> dict:
        """A row with its error over that of the best baseline of its depth, and of as many evaluations."""
        for cost in RIVALS:
            if row[cost] in self.rivals:
                best, theirs = min(self.rivals[row[cost]], key=lambda found: found[0]["rmse"])
                difference, half = mean_and_halfwidth(errors - theirs)
                told = {"solver": best["solver"], "schedule": best["schedule"], "rmse": best["rmse"]}
                told |= {
                    "ratio": row["rmse"] / best["rmse"],
                    "difference": difference,
                    "difference_halfwidth": half,
                }
                row = row | {f"same_{cost}": told}
        return row


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
    "evals",
    "RMSE to teacher",
    "x best of same depth",
    "x best of same evals",
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
    rival = row[f"same_{cost}"]
    return f"{rival['ratio']:.2f} ± {rival['difference_halfwidth'] / rival['rmse']:.2f}"


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
    told = ["best baseline, its RMSE"] if cost == "depth" else []
    header = ["guidance", "depth", *told, *[f"{k} (evals)" for k in kinds]]
    return (
        f"Error over the best baseline's {RIVALS[cost]}:\n\n"
        + text_table(header, lines, text_columns=len(told) + 2)
        + "\n"
    )
