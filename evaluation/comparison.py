"""Paired comparison of runs, image folders of the same prompts and seeds, by their scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common.records as manifest
from common.statistics import by_prompt, estimate, sign_test

from .scores import Scores, ScoresError, metrics_of, read_scores
from .tables import interval_footnote, number, text_table, with_interval

HEADER = [
    "run",
    "metric",
    "difference [95 %]",
    "std. error",
    "win rate",
    "sign test p (prompts)",
    "pairs",
    "prompts",
    "trained on it",
]


@dataclass(frozen=True)
class Run:
    """An image folder, what to call it, and its scores by metric."""

    folder: Path
    name: str
    scores: dict[str, Scores]

    @property
    def settings(self) -> dict:
        """The settings of its manifest when it was scored."""
        return next(iter(self.scores.values())).summary["images"]


def load_runs(folders: Sequence[Path], metrics: Sequence[str]) -> list[Run]:
    """The runs with the scores of some metrics, or of all that any of them has; what cannot be compared with
    the first: ScoresError.
    """
    names = metrics or sorted({metric for folder in folders for metric in metrics_of(folder)})
    if not names:
        raise ScoresError(f"no scores in {', '.join(map(str, folders))}; run evaluate.py score on each first")
    for name in names:
        with_them = next((folder for folder in folders if name in metrics_of(folder)), None)
        without = next((folder for folder in folders if name not in metrics_of(folder)), None)
        if without is not None and with_them is not None:
            remedy = (
                f"run evaluate.py score --images {without} --metrics {name}, or choose others with --metrics"
            )
            raise ScoresError(f"{without} has no {name} scores, but {with_them} has; {remedy}")
    runs = [
        Run(f, name_of(f, folders), {metric: read_scores(f, metric) for metric in names}) for f in folders
    ]
    for run in runs:
        for metric in names:
            check_alike(runs[0].scores[metric], run.scores[metric])
    return runs


def name_of(folder: Path, folders: Sequence[Path]) -> str:
    """A folder's own name, or its path where another has the same name."""
    others = {other for other in folders if other != folder}
    return str(folder) if folder.name in {other.name for other in others} else folder.resolve().name


def check_alike(first: Scores, other: Scores) -> None:
    """Refuse scores of another protocol, or of other prompts and seeds, than the first run's."""
    one, two = first.summary["protocol"], other.summary["protocol"]
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            values = f"{manifest.short(one.get(key))} and {manifest.short(two.get(key))}"
            raise ScoresError(
                f"{first.folder} and {other.folder} were scored by unlike protocols of {first.metric}: {key}"
                f" is {values}"
            )
    for has, lacks in ((first, other), (other, first)):
        known = lacks.pairs()
        missing = [pair for pair in has.pairs() if pair not in known]
        if missing:
            prompt, seed = missing[0]
            image = f"prompt {manifest.short(prompt)} with seed {seed}"
            raise ScoresError(
                f"{first.folder} and {other.folder} cannot be paired: {has.folder} has {image}, which"
                f" {lacks.folder} lacks ({len(missing)} such); make both with the same prompts and seeds"
            )


def compare(first: Run, other: Run, metric: str) -> dict:
    """Difference of a run to the first, image by image: mean with standard error and interval by prompt, win
    rate, sign test.

    The win rate is that of images, ties half. The sign test is that of prompts, which are independent where
    images of one prompt are not: a prompt is won when the mean difference of its images is above 0, and ties
    are left out.
    """
    first_lines, other_lines = first.scores[metric].pairs(), other.scores[metric].pairs()
    differences = [other_lines[pair]["score"] - line["score"] for pair, line in first_lines.items()]
    prompts = [prompt for prompt, _ in first_lines]
    wins, ties, losses = signs(differences)
    of_prompts = signs(by_prompt(differences, prompts)[0].tolist())
    return {
        "run": str(other.folder),
        "against": str(first.folder),
        "metric": metric,
        "difference": asdict(estimate(differences, prompts)),
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "win_rate": (wins + ties / 2) / len(differences),
        "prompt_wins": of_prompts[0],
        "prompt_ties": of_prompts[1],
        "prompt_losses": of_prompts[2],
        "sign_test_p": sign_test(of_prompts[0], of_prompts[2]),
        "trained_on": {
            "run": other.scores[metric].summary["trained_on"],
            "against": first.scores[metric].summary["trained_on"],
        },
        "protocol_id": first.scores[metric].summary["protocol_id"],
    }


def signs(differences: Sequence[float]) -> tuple[int, int, int]:
    """How many differences are above 0, 0 and below 0."""
    wins, losses = (sum(bool(sign * d > 0) for d in differences) for sign in (1, -1))
    return wins, len(differences) - wins - losses, losses


def comparisons(runs: Sequence[Run]) -> list[list[dict]]:
    """For each later run, its comparison with the first on each metric."""
    return [[compare(runs[0], run, metric) for metric in run.scores] for run in runs[1:]]


def trained_on(row: dict) -> str:
    """Which of the two runs were trained on the metric, in words."""
    runs = {"this run": row["trained_on"]["run"], "first run": row["trained_on"]["against"]}
    known = [name for name, trained in runs.items() if trained]
    unknown = [f"{name} unknown" for name, trained in runs.items() if trained is None]
    return "both" if len(known) == 2 else ", ".join(known + unknown) or "no"


def comparison_table(runs: Sequence[Run], rows: Sequence[Sequence[dict]]) -> str:
    """The comparisons as a Markdown table, and under it how its intervals were made where they are not
    bootstrapped.
    """
    cells = [
        [
            run.name,
            row["metric"],
            with_interval(row["difference"]["mean"], row["difference"]["interval"], signed=True),
            number(row["difference"]["standard_error"]),
            number(row["win_rate"]),
            p_value(row["sign_test_p"]),
            str(row["difference"]["count"]),
            str(row["difference"]["prompts"]),
            trained_on(row),
        ]
        for run, of_run in zip(runs[1:], rows, strict=True)
        for row in of_run
    ]
    methods = [row["difference"]["method"] for of_run in rows for row in of_run]
    return text_table(HEADER, cells, text_columns=2) + interval_footnote(methods)


def p_value(p: float) -> str:
    """A p-value with two significant digits."""
    return "1" if p == 1 else f"{p:.2g}"
