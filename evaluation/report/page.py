"""The report: one HTML page that needs nothing else, with its plots beside it as PNG."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.files import path_within, read_file, write_atomically
from common.images import MAX_BYTES, decode_image
from common.statistics import STUDENT
from solvers import Predictor, SolverTable, UserError, load_predictor

from ..comparison import Run, comparisons, p_value, trained_on
from ..tables import STUDENT_NOTE, number
from . import plots
from .plots import Picture, Point

SHOWN = 8
SIDE = 256  # pixels of a larger image's longer side in the page
COSTS = {"depth": "serial depth", "evaluations": "evaluations an image"}


def write_report(runs: Sequence[Run], predictors: Mapping[str, Path], out: Path, title: str) -> list[Path]:
    """Write the page and its plots; returns their paths."""
    pictures = quality_plots(runs)
    tables, compared = solver_tables(runs, predictors), comparisons(runs)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            runs=runs,
            first=next(iter(runs[0].scores.values())).summary,
            intervals=interval_notes(runs, compared),
            metrics=[(name, scores.summary["protocol"]) for name, scores in runs[0].scores.items()],
            rows=list(zip(runs[1:], compared, strict=True)),
            pictures=pictures,
            uncosted=[run.name for run in runs if not run.settings.keys() >= {"solver", *COSTS}],
            samples=samples(runs),
            tables=tables,
        )
    )
    paths = [out]
    out.parent.mkdir(parents=True, exist_ok=True)
    for drawn in [*pictures, *(table["picture"] for table in tables)]:
        paths.append(out.with_name(f"{out.stem}-{drawn.name}.png"))
        write_atomically(paths[-1], drawn.light)
    write_atomically(out, page.encode())
    return paths


def interval_notes(runs: Sequence[Run], compared: Sequence[Sequence[dict]]) -> list[str]:
    """How the intervals of the scores and of the differences were made, a sentence a method."""
    summaries = [scores.summary for run in runs for scores in run.scores.values()]
    methods = [summary.get("method") for summary in summaries] + [
        row["difference"]["method"] for of_run in compared for row in of_run
    ]
    notes = [
        f"Intervals are a percentile bootstrap over prompts, {made['resamples']} resamples, seed"
        f" {made['seed']}."
        for made in [summary["bootstrap"] for summary in summaries if "bootstrap" in summary][:1]
    ]
    return [*notes, STUDENT_NOTE] if STUDENT in methods else notes


def environment() -> Environment:
    """Templates of this folder, everything in them escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "p_value": p_value, "uri": data_uri, "trained_on": trained_on}
    return made


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def quality_plots(runs: Sequence[Run]) -> list[Picture]:
    """Each metric against serial depth and against NFE, of the runs whose manifests hold these."""
    costed = [run for run in runs if run.settings.keys() >= {"solver", *COSTS}]
    pictures = []
    for metric in runs[0].scores if costed else ():
        for key, cost in COSTS.items():
            points = [point_of(run, metric, key) for run in costed]
            values = "; ".join(
                f"{run.name} {number(p.mean)} at {p.cost}" for run, p in zip(costed, points, strict=True)
            )
            alt = f"{metric} against {cost}: {values}."
            pictures.append(plots.quality(f"{metric}-{key}", alt, points, metric, cost))
    return pictures


def point_of(run: Run, metric: str, cost: str) -> Point:
    """A run in a plot; runs of one baseline are a series, a learned solver is one by itself."""
    settings, summary = run.settings, run.scores[metric].summary
    series = settings["solver"] if settings.get("predictor") is None else run.name
    return Point(series, settings[cost], summary["mean"], summary["interval"], summary["trained_on"])


def samples(runs: Sequence[Run]) -> list[dict]:
    """Images of the same prompts and seeds from all runs, of as many prompts as there are rows to show, with
    their scores.
    """
    lines = [{metric: scores.pairs() for metric, scores in run.scores.items()} for run in runs]
    turns: dict[str, int] = {}
    order = []
    for at, (prompt, seed) in enumerate(next(iter(lines[0].values()))):
        turns[prompt] = turns.get(prompt, 0) + 1
        order.append((turns[prompt], at, (prompt, seed)))
    rows = []
    for _, _, pair in sorted(order)[:SHOWN]:
        cells = []
        for run, of_run in zip(runs, lines, strict=True):
            of_image = {metric: pairs[pair] for metric, pairs in of_run.items()}
            path = path_within(run.folder, next(iter(of_image.values()))["file"])
            source, small = thumbnail(path)
            scores = [(k, line["score"], run.scores[k].summary["trained_on"]) for k, line in of_image.items()]
            cells.append({"run": run.name, "source": source, "small": small, "scores": scores})
        rows.append({"prompt": pair[0], "seed": pair[1], "cells": cells})
    return rows


def thumbnail(path: Path) -> tuple[str, bool]:
    """An image as an address that holds it, made smaller where it has more than SIDE pixels a side; whether
    it has few of them.
    """
    if not path.exists():
        raise UserError(f"{path}: is in the scores but not there; make the image again")
    image = decode_image(read_file(path, MAX_BYTES), path)
    content, kind, small = BytesIO(), "png", max(image.size) <= SIDE // 4
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
        kind = "jpeg"
    image.save(content, kind, quality=90)
    return data_uri(content.getvalue(), kind), small


def solver_tables(runs: Sequence[Run], predictors: Mapping[str, Path]) -> list[dict]:
    """The learned tables of the runs whose predictor files are known, drawn and in numbers, each once."""
    users: dict[str, list[str]] = {}
    for run in runs:
        if run.settings.get("predictor") in predictors:
            users.setdefault(run.settings["predictor"], []).append(run.name)
    tables = []
    for at, (sha, names) in enumerate(users.items(), 1):
        predictor = load_predictor(predictors[sha])
        picture = drawn(predictor, f"table-{at}", names[0])
        tables.append({"runs": list(dict.fromkeys(names)), "picture": picture} | in_numbers(predictor))
    return tables


def drawn(predictor: Predictor, name: str, run: str) -> Picture:
    """A learned table or tableau as a figure."""
    table = predictor.table
    if isinstance(table, SolverTable):
        steps = [
            f"interval {n}: "
            + ", ".join(f"r {number(r)} weight {number(w)}" for r, w in zip(*rows, strict=True))
            for n, rows in enumerate(zip(table.r.tolist(), table.w.tolist(), strict=True))
        ]
        return plots.solver_table(name, f"Positions and weights of {run}. {'; '.join(steps)}.", table)
    steps = [
        f"level {n}: σ " + ", ".join(number(table.sigmas[s].item()) for s in level)
        for n, level in enumerate(table.levels)
    ]
    return plots.tableau(name, f"Stages of {run} and their weights in the result. {'; '.join(steps)}.", table)


def in_numbers(predictor: Predictor) -> dict:
    """Header and rows of a learned table's numbers: positions and weights of each interval, or the stages of
    a tableau.
    """
    table = predictor.table
    if not isinstance(table, SolverTable):
        rows = [
            [n, s, table.sigmas[s].item(), table.output[1 + s].item()]
            for n, level in enumerate(table.levels)
            for s in level
        ]
        return {"header": ["level", "stage", "σ", "weight in the result"], "rows": rows}
    arrays = table.arrays()
    header = [f"{name}{k + 1}" for name in arrays for k in range(table.num_points)]
    rows = [
        [n, *(value for array in arrays.values() for value in array[n].tolist())]
        for n in range(table.num_intervals)
    ]
    if predictor.sigmas is None:
        return {"header": ["interval", *header], "rows": rows}
    nodes, numbers = predictor.sigmas.tolist(), [row[1:] for row in rows]
    return {
        "header": ["interval", "σ from", "σ to", *header],
        "rows": [[n, *nodes[n : n + 2], *row] for n, row in enumerate(numbers)],
    }
