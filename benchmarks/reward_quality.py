"""How well the digits reward reads what it was never shown: python -m benchmarks.reward_quality."""

from pathlib import Path

import click
import torch

from common.errors import run_command
from digits.data import COLOURS, DIGITS, WEIGHTS, Label, caption
from digits.drawings import held_out_drawings
from rewards import load_reward

from .report import mean_and_halfwidth, text_table, write_json

CHOICES = {"digit": range(len(DIGITS)), "colour": range(len(COLOURS)), "weight": range(len(WEIGHTS))}


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/reward_quality.json"),
    show_default=True,
)
def main(out: Path) -> None:
    """Zero-shot accuracy on held-out scans: of the captions that differ in one part, does the right one score
    best?
    """
    reward = load_reward("digits", {}, "cpu")
    images, labels = held_out_drawings()
    rows = []
    for part, choices in CHOICES.items():
        scores = []
        for value in choices:
            prompts = [caption(Label(**{**vars(label), part: value})) for label in labels]
            scores.append(
                torch.cat(
                    [reward(images[i : i + 256], prompts[i : i + 256]) for i in range(0, len(images), 256)]
                )
            )
        right = torch.stack(scores).argmax(0) == torch.tensor([vars(label)[part] for label in labels])
        mean, half = mean_and_halfwidth(right)
        rows.append(
            {"part": part, "choices": len(choices), "n": len(labels), "accuracy": mean, "halfwidth": half}
        )
    table = [
        [r["part"], str(r["choices"]), str(r["n"]), f"{100 * r['accuracy']:.1f} ± {100 * r['halfwidth']:.1f}"]
        for r in rows
    ]
    click.echo(text_table(["part", "captions", "drawings", "accuracy %"], table))
    write_json(out, {"scans": "held out"}, rows, torch.device("cpu"))


if __name__ == "__main__":
    run_command(main)
