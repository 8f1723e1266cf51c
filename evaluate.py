"""Score images, compare solvers, write the report: python evaluate.py score | compare | report --help."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from common.distributed import process_group, use_single_thread
from common.errors import run_command
from common.files import write_atomically
from common.plugins import allow_code, is_code
from evaluation.comparison import comparison_table, comparisons, load_runs
from evaluation.images import read_image_set
from evaluation.provenance import find_predictors, training_of
from evaluation.report.page import write_report
from evaluation.scoring import Metric, score_images
from evaluation.tables import interval_footnote, text_table, with_interval
from rewards import NAMES, check_reward, load_reward
from solvers import UserError

FOLDER = click.Path(path_type=Path)
METRICS_HELP = f"One or more of {', '.join(NAMES)} or my_module:MyReward, with commas."
TRAINED_ON = {True: "yes", False: "no", None: "unknown"}


def names_of(context, parameter, text: str) -> list[str]:
    """The names of "hps,clip,my_module:MyReward"; one that is twice or no metric: UserError."""
    names = [name.strip() for name in text.split(",")] if text else []
    for name in names:
        if name not in NAMES and not is_code(name):
            raise UserError(
                f"--metrics {text!r}: {name!r} is no metric, expected one or more of {', '.join(NAMES)}"
            )
        if names.count(name) > 1:
            raise UserError(f"--metrics {text!r}: {name} is there twice; name it once")
    allow_code(*names)
    return names


def options_of(texts: tuple[str, ...], metrics: list[str]) -> dict[str, dict[str, Any]]:
    """The options of each metric, from metric.key=value; more dots reach into the mappings of an option."""
    options: dict[str, dict[str, Any]] = {metric: {} for metric in metrics}
    for text in texts:
        name, equals, value = text.partition("=")
        metric = next((metric for metric in metrics if name.startswith(f"{metric}.")), name.split(".")[0])
        keys = name[len(metric) + 1 :].split(".")
        if not equals or not keys or not all(keys):
            raise UserError(f"--option {text!r}: expected metric.key=value, such as hps.weights_path=hps.pt")
        if metric not in options:
            raise UserError(f"--option {text!r}: {metric!r} is not among --metrics {','.join(metrics)}")
        place = options[metric]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UserError(f"--option {text!r}: {key!r} has a value already; give one of the two")
        if keys[-1] in place:
            raise UserError(f"--option {text!r}: {name} is there twice; give it once")
        place[keys[-1]] = value_of(value)
    return options


def value_of(text: str) -> Any:
    """The JSON value of a text, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@click.group()
def main() -> None:
    """How good images are, whether one solver's are better than another's, and a page that shows it."""


METRICS = click.option(
    "--metrics",
    default="",
    callback=names_of,
    help="Such as hps,clip; by default all that any of the runs has.",
)
EXPS = click.option(
    "--exps",
    type=FOLDER,
    multiple=True,
    help="Where predictor files are looked for by their hash; default: exps.",
)
RUNS = click.option(
    "--run",
    "folders",
    type=FOLDER,
    multiple=True,
    required=True,
    help="A scored folder; the first is compared with.",
)
TEACHERS = click.option(
    "--teacher",
    "teachers",
    type=FOLDER,
    multiple=True,
    help="The scored folder of a fine solver, one a backbone: shown first and as a line, no baseline.",
)


@main.command()
@click.option(
    "--images",
    "folders",
    type=FOLDER,
    multiple=True,
    required=True,
    help="The --outdir of sample.py, or any folder with --prompts.",
)
@click.option(
    "--metrics",
    required=True,
    callback=names_of,
    help=METRICS_HELP,
)
@click.option(
    "--prompts",
    type=FOLDER,
    help="Text, CSV or COCO file, for images without a manifest: one an image, paired by sorted name.",
)
@click.option(
    "--option",
    "texts",
    multiple=True,
    help="metric.key=value: an option of a metric, such as hps.weights_path=hps.pt.",
)
@click.option("--batch", type=click.IntRange(1), default=64, show_default=True, help="Images in a batch.")
@click.option("--device", help="cpu, cuda, cuda:1, mps; CUDA where there is one by default.")
@EXPS
def score(folders, metrics, prompts, texts, batch, device, exps) -> None:
    """Score images: DIR/scores/METRIC.jsonl and a summary. Run again, it goes on where it stopped; torchrun
    shares the work out.
    """
    if not metrics:
        raise UserError(f"--metrics is empty, expected one or more of {', '.join(NAMES)}")
    options, predictors = options_of(texts, metrics), find_predictors(exps)
    sets = [read_image_set(folder, prompts) for folder in folders]
    trainings = [training_of(images.settings, predictors) for images in sets]
    import backends.quiet  # noqa: F401  it takes seconds

    notes = [note for metric in metrics for note in check_reward(metric, options[metric])]
    with process_group(device) as ranks:
        use_single_thread(ranks)
        if any(s.settings.get("predictor") and not t.complete for s, t in zip(sets, trainings, strict=True)):
            notes.append(
                "not all rewards that this solver was trained on are known: a predictor file is missing;"
                " --exps DIR says where to look for it"
            )
        for note in notes if ranks.rank == 0 else ():
            click.echo(f"note: {note}", err=True)
        summaries = []
        for name in metrics:
            metric = Metric(name, load_reward(name, options[name], ranks.device), batch)
            for images, training in zip(sets, trainings, strict=True):
                summary = score_images(images, metric, training, ranks)
                if summary is not None:
                    summaries.append((images.folder.name, summary))
            del metric  # one reward is in memory at a time
        if ranks.rank == 0:
            click.echo(summary_table(summaries))


def summary_table(summaries: Sequence[tuple[str, dict]]) -> str:
    """The means of folders and metrics as a Markdown table."""
    header = ["folder", "metric", "mean [95 %]", "images", "prompts", "trained on it"]
    rows = [
        [
            folder,
            summary["metric"],
            with_interval(summary["mean"], summary["interval"]),
            str(summary["count"]),
            str(summary["prompts"]),
            TRAINED_ON[summary["trained_on"]],
        ]
        for folder, summary in summaries
    ]
    methods = [summary["method"] for _, summary in summaries]
    return text_table(header, rows, text_columns=2) + interval_footnote(methods)


@main.command("compare")
@RUNS
@METRICS
@click.option("--out", type=FOLDER, help="A JSON file of the comparisons.")
def compare_command(folders, metrics, out) -> None:
    """Compare runs with the first one, image by image of the same prompt and seed; prints a Markdown
    table.
    """
    if len(folders) < 2:
        raise UserError(f"--run {folders[0]}: nothing to compare it with; give --run once more")
    runs = load_runs(folders, metrics)
    rows = comparisons(runs)
    click.echo(f"differences to {runs[0].name}\n\n{comparison_table(runs, rows)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        flat = [row for of_run in rows for row in of_run]
        write_atomically(
            out,
            (
                json.dumps({"comparisons": flat}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            ).encode(),
        )


@main.command()
@RUNS
@TEACHERS
@METRICS
@click.option(
    "--out",
    type=FOLDER,
    default=Path("report.html"),
    show_default=True,
    help="The page; its plots go beside it as PNG.",
)
@click.option("--title", default="Comparison of solvers", show_default=True)
@EXPS
def report(folders, teachers, metrics, out, title, exps) -> None:
    """Write one HTML page that needs nothing else, a section a backbone: learned solvers against the best
    baselines of their cost, plots, images, differences to the first run of that backbone, learned tables.
    """
    runs = load_runs([*teachers, *(f for f in folders if f not in teachers)], metrics)
    paths = write_report(runs, find_predictors(exps), out, title, teachers)
    click.echo(f"wrote {out} and {len(paths) - 1} plots beside it")


if __name__ == "__main__":
    run_command(main)
