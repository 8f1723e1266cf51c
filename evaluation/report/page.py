"""The report: one HTML page that needs nothing else, with its plots beside it as PNG."""

from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.files import path_within, read_file, write_atomically
from common.images import MAX_BYTES, decode_image
from common.statistics import STUDENT
from solvers import UserError

from ..comparison import Run, p_value, trained_on
from ..tables import STUDENT_NOTE, number
from . import plots
from .families import Entry, Family, families_of
from .learned import solver_tables
from .plots import Mark, Panel, Point

SHOWN = 8
SIDE = 256  # pixels of a larger image's longer side in the page
COSTS = {"depth": "serial depth", "evaluations": "NFE (evaluations an image)"}
HERE = Path(__file__).parent


def write_report(
    runs: Sequence[Run],
    predictors: Mapping[str, Path],
    out: Path,
    title: str,
    teachers: Collection[Path] = (),
) -> list[Path]:
    """Write the page and its plots; returns their paths.

    Args:
        runs: scored folders of the same prompts and seeds, of one family or of several.
        predictors: predictor files by the SHA-256 of their bytes.
        out: the page.
        title: its title.
        teachers: the folders among the runs that a fine solver made; they come first in their family.
    """
    families = families_of(runs, predictors, teachers)
    marks = marks_of(families)
    panels = {family.anchor: panels_of(family, marks) for family in families}
    tables = solver_tables(families, predictors)
    script = (HERE / "sort.js").read_text()
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            style=Markup((HERE / "style.css").read_text()),
            script=Markup(script),
            script_hash=b64encode(sha256(script.encode()).digest()).decode(),
            families=[family_view(family, panels[family.anchor], marks) for family in families],
            first=next(iter(runs[0].scores.values())).summary,
            runs=runs,
            intervals=interval_notes(families),
            metrics=[(name, scores.summary["protocol"]) for name, scores in runs[0].scores.items()],
            tables=tables,
        )
    )
    files = {f"table-{at}": table["picture"].png for at, table in enumerate(tables, 1)}
    for family in families:
        if drawn := panels[family.anchor]:
            files[family.anchor] = plots.with_legend(drawn, family.name)
    paths = [out]
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        paths.append(out.with_name(f"{out.stem}-{name}.png"))
        write_atomically(paths[-1], content)
    write_atomically(out, page.encode())
    return paths


def family_view(family: Family, panels: Sequence[Panel], marks: Mapping[str, Mark]) -> dict:
    """What the template shows of a family."""
    differences = family.differences()
    used = dict.fromkeys(marks[e.solver] for e in family.students if "depth" in e.run.settings)
    return {
        "family": family,
        "headline": family.headline(),
        "verdicts": family.verdicts(),
        "best": {metric: family.best(metric) for metric in family.metrics},
        "differences": differences,
        "differences_by_name": {entry.name: of_entry for entry, of_entry in differences},
        "pictures": [plots.quality(panel) for panel in panels],
        "legend": [(mark.label, plots.legend_svg(mark, f"{family.anchor}-legend-{mark.at}")) for mark in used]
        if panels
        else [],
        "has_teacher": any(entry.teacher for entry in family.entries),
        "uncosted": [entry.name for entry in family.entries if "depth" not in entry.run.settings],
        "samples": samples(family),
    }


def interval_notes(families: Sequence[Family]) -> list[str]:
    """How the intervals of the scores and of the differences were made, a sentence a method."""
    entries = [entry for family in families for entry in family.entries]
    summaries = [scores.summary for entry in entries for scores in entry.run.scores.values()]
    methods = [summary.get("method") for summary in summaries] + [
        row["difference"]["method"]
        for family in families
        for _, of_entry in family.differences()
        for row in of_entry.values()
    ]
    notes = [
        f"Intervals are a percentile bootstrap over prompts, {made['resamples']} resamples, seed"
        f" {made['seed']}."
        for made in [summary["bootstrap"] for summary in summaries if "bootstrap" in summary][:1]
    ]
    return [*notes, STUDENT_NOTE] if STUDENT in methods else notes


def brief(value: float | None, signed: bool = False) -> str:
    """Three significant digits."""
    return number(value, signed, digits=3)


def environment() -> Environment:
    """Templates of this folder, everything in them escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "brief": brief, "p_value": p_value, "trained_on": trained_on}
    made.filters["svg"] = Markup  # of matplotlib, its texts escaped
    return made


def data_uri(content: bytes, kind: str = "png") -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def marks_of(families: Sequence[Family]) -> dict[str, Mark]:
    """How each series is drawn, the same in all families; what was learned comes first."""
    entries = [entry for family in families for entry in family.students]
    series = dict.fromkeys((e.solver, e.learned) for e in sorted(entries, key=lambda e: not e.learned))
    return {label: Mark(label, at, learned) for at, (label, learned) in enumerate(series)}


def panels_of(family: Family, marks: Mapping[str, Mark]) -> list[Panel]:
    """Each metric against serial depth and against NFE, of the runs whose manifests hold these."""
    costed = [entry for entry in family.students if "depth" in entry.run.settings]
    teacher = next((entry for entry in family.entries if entry.teacher), None)
    return [
        Panel(
            f"{family.anchor}-{metric}-{key}",
            metric,
            cost,
            [point_of(entry, metric, key, marks[entry.solver]) for entry in costed],
            None if teacher is None else point_of(teacher, metric, key, Mark("teacher", 0, False)),
        )
        for metric in (family.metrics if costed else ())
        for key, cost in COSTS.items()
    ]


def point_of(entry: Entry, metric: str, cost: str, mark: Mark) -> Point:
    """A run in a plot."""
    summary = entry.run.scores[metric].summary
    return Point(
        mark, entry.run.settings.get(cost, 0), summary["mean"], summary["interval"], summary["trained_on"]
    )


def samples(family: Family) -> list[dict]:
    """Images of the same prompts and seeds from all runs, of as many prompts as there are rows to show, with
    their scores.
    """
    entries = family.entries
    lines = [{metric: scores.pairs() for metric, scores in e.run.scores.items()} for e in entries]
    turns: dict[str, int] = {}
    order = []
    for at, (prompt, seed) in enumerate(next(iter(lines[0].values()))):
        turns[prompt] = turns.get(prompt, 0) + 1
        order.append((turns[prompt], at, (prompt, seed)))
    rows = []
    for _, _, pair in sorted(order)[:SHOWN]:
        cells = []
        for entry, of_run in zip(entries, lines, strict=True):
            of_image = {metric: pairs[pair] for metric, pairs in of_run.items()}
            source, small = thumbnail(path_within(entry.run.folder, next(iter(of_image.values()))["file"]))
            scores = [
                (k, line["score"], entry.run.scores[k].summary["trained_on"]) for k, line in of_image.items()
            ]
            cells.append({"run": entry.name, "source": source, "small": small, "scores": scores})
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
