"""What the parts of the demo share."""

from dataclasses import dataclass
from pathlib import Path

import click
from torch import Tensor

from backends import Backend
from common.distributed import Ranks
from digits.data import parse
from digits.judge import Judge
from generation.generate import Sampler
from solvers import load_predictor
from training.distill.bank import rmse_per_image

from ..quality.teacher_reference import EXPS, Samples, TeacherReference
from ..report import mean_and_halfwidth, text_table

GUIDANCE, DEPTH = 7.5, 6
WIDTH = 100  # columns of what is printed


@dataclass(frozen=True)
class Setting:
    """The digits backbone, where the demo writes, and the teacher's images that solvers are measured on."""

    backend: Backend
    ranks: Ranks
    out: Path
    reference: TeacherReference
    tuning: TeacherReference
    """The same for other prompts and seeds, on which a baseline's schedule is chosen."""

    def learned(self, path: Path, name: str) -> Sampler:
        """The solver of a predictor file."""
        predictor = load_predictor(path)
        assert predictor.sigmas is not None, path  # of the digits, which hold their nodes
        return Sampler(self.backend, predictor.solver(), name, predictor.sigmas, GUIDANCE)

    def shipped(self, kind: str, name: str) -> Sampler:
        """A shipped table of the demo's guidance and depth."""
        return self.learned(EXPS / "digits" / "grid" / f"{kind}-g{GUIDANCE:g}-d{DEPTH}.pkl", name)

    def measure(self, sampler: Sampler) -> "Measured":
        """A solver's error to the teacher and the share of its images that are right."""
        samples = self.reference.sample(sampler)
        labels = [parse(prompt) for prompt in self.reference.pairs.prompts]
        right = Judge(device=self.backend.device)(samples[1], labels).digit_and_colour
        return Measured(sampler, samples, rmse_per_image(samples[0], self.reference.teacher[0]), right)


@dataclass(frozen=True)
class Measured:
    """A solver on the images of the reference."""

    sampler: Sampler
    samples: Samples
    errors: Tensor
    right: Tensor
    """1 where the judge reads the digit and the colour of the prompt."""

    @property
    def name(self) -> str:
        """The solver's name."""
        return self.sampler.solver_name

    @property
    def error(self) -> float:
        """Mean RMSE to the teacher."""
        return self.errors.mean().item()

    @property
    def nfe(self) -> int:
        """Network evaluations of an image."""
        return self.sampler.cost.evaluations

    def row(self) -> dict:
        """Costs and means with half their intervals, for a figure or a file."""
        error, half = mean_and_halfwidth(self.errors)
        right, right_half = mean_and_halfwidth(self.right)
        return {
            "solver": self.name,
            "depth": self.sampler.cost.depth,
            "evaluations": self.nfe,
            "rmse": error,
            "rmse_halfwidth": half,
            "digit_and_colour": right,
            "digit_and_colour_halfwidth": right_half,
        }


HEADER = ["solver", "depth", "NFE", "error to the teacher", "right digit and colour"]


def error_table(measured: list[Measured]) -> str:
    """Solvers by their error, the smallest first, as a Markdown table."""
    rows = [m.row() for m in sorted(measured, key=lambda m: m.error)]
    return text_table(
        HEADER,
        [
            [
                r["solver"],
                str(r["depth"]),
                str(r["evaluations"]),
                f"{r['rmse']:.3f} ± {r['rmse_halfwidth']:.3f}",
                f"{100 * r['digit_and_colour']:.0f} ± {100 * r['digit_and_colour_halfwidth']:.0f} %",
            ]
            for r in rows
        ],
    )


def announce(part: int, text: str) -> None:
    """The progress line of a part."""
    click.echo(f"\n[{part}/4] {text}")
