"""The held-out evaluation: prompts and seeds that nothing was trained or chosen on, paired, beside the
teacher.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from backends import Backend
from digits.data import ALL_LABELS, HELD_OUT_LABELS, TEMPLATES, caption, evaluation_prompts, parse
from digits.judge import Judge
from generation.generate import Sampler
from rewards import Reward, load_reward
from solvers import Predictor
from training.distill.bank import rmse_per_image

from ..report import mean_and_halfwidth
from .teacher_reference import PromptSeeds, TeacherReference

FIRST_SEED = 600_000


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Prompts, seeds and the teacher's images, and the reward and the judge that score images."""

    reference: TeacherReference
    reward: Reward
    judge: Judge

    @classmethod
    def make(cls, backend: Backend, guidance: float, n: int, keep: Path) -> "HeldoutEvaluation":
        """At least n images, as many of each prompt; the teacher's are kept in a folder."""
        own = fresh_prompts()
        prompts = own * -(-n // len(own))
        pairs = PromptSeeds.from_prompts(prompts, FIRST_SEED)
        reference = TeacherReference.make(backend, guidance, pairs, keep=keep)
        return cls(reference, load_reward("digits", {}, "cpu"), Judge())

    def sampler(self, name: str, predictor: Predictor) -> Sampler:
        """The sampler of a predictor."""
        backend, guidance = self.reference.backend, self.reference.guidance
        return Sampler(backend, predictor.solver(), name, predictor.sigmas, guidance)

    def measure(self, sampler: Sampler) -> dict[str, Tensor]:
        """What `measure_images` says of a sampler's images."""
        latents, images, _ = self.reference.sample(sampler)
        return self.measure_images(latents, images)

    def by_prompt(self, values: Tensor) -> Tensor:
        """The mean of each prompt's values: images of one prompt are not independent."""
        return values.view(-1, len(set(self.reference.pairs.prompts))).mean(0)

    def measure_images(self, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Image by image: trained reward, judge's verdict, error to the teacher; and the judge's features."""
        verdict = self.judge(images, [parse(p) for p in self.reference.pairs.prompts])
        return {
            "reward": self.reward(images, self.reference.pairs.prompts).double(),
            "digit_and_colour": verdict.digit_and_colour.double(),
            "rmse": rmse_per_image(latents, self.reference.teacher[0]),
            "features": verdict.features,
        }

    def row(
        self,
        name: str,
        sampler: Sampler | None,
        values: dict[str, Tensor],
        base: dict[str, Tensor] | None = None,
    ) -> dict:
        """Means with half a 95 % interval, and paired gains over `base`."""
        cost = None if sampler is None else sampler.cost
        row: dict = {
            "solver": name,
            "depth": None if cost is None else cost.depth,
            "evaluations": None if cost is None else cost.evaluations,
        }
        for key in ("reward", "digit_and_colour", "rmse"):
            row[key], row[f"{key}_halfwidth"] = mean_and_halfwidth(self.by_prompt(values[key]))
            if base is not None:
                gains = self.by_prompt(values[key] - base[key])
                row[f"{key}_gain"], row[f"{key}_gain_halfwidth"] = mean_and_halfwidth(gains)
        return row | {"frechet_percent": self.judge.frechet(values["features"])}


def fresh_prompts() -> list[str]:
    """Captions of the combinations that the backbone was never trained on, none of which training or its
    evaluation uses.
    """
    known = set(evaluation_prompts(len(ALL_LABELS)))
    return [
        text
        for t in TEMPLATES
        for c in sorted(HELD_OUT_LABELS, key=str)
        if (text := caption(c, t)) not in known
    ]


HEADER = [
    "solver",
    "depth",
    "NFE",
    "reward",
    "gain in reward",
    "digit+colour %",
    "gain",
    "Frechet %",
    "RMSE to teacher",
]


def cells_of(row: dict) -> list[str]:
    """A row of the printed table."""

    def gain(key: str, factor: float = 1) -> str:
        return (
            f"{factor * row[f'{key}_gain']:+.4g} ± {factor * row[f'{key}_gain_halfwidth']:.2g}"
            if f"{key}_gain" in row
            else ""
        )

    return [
        row["solver"],
        str(row["depth"] or ""),
        str(row["evaluations"] or ""),
        f"{row['reward']:.4f} ± {row['reward_halfwidth']:.4f}",
        gain("reward"),
        f"{100 * row['digit_and_colour']:.1f} ± {100 * row['digit_and_colour_halfwidth']:.1f}",
        gain("digit_and_colour", 100),
        f"{row['frechet_percent']:.2f}",
        f"{row['rmse']:.3f} ± {row['rmse_halfwidth']:.3f}",
    ]
