"""The learned solvers of a report: drawn, and in numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from solvers import Predictor, SolverTable, load_predictor

from ..tables import number
from . import plots
from .families import Family
from .svg import Picture


def solver_tables(families: Sequence[Family], predictors: Mapping[str, Path]) -> list[dict]:
    """The learned tables of the runs whose predictor files are known, drawn and in numbers, each once."""
    users: dict[str, list[str]] = {}
    for family in families:
        for entry in family.entries:
            sha = entry.run.settings.get("predictor")
            if sha in predictors:
                users.setdefault(sha, []).append(f"{family.name}: {entry.name}")
    tables = []
    for at, (sha, names) in enumerate(users.items(), 1):
        predictor = load_predictor(predictors[sha])
        picture = drawn(predictor, f"table-{at}", names[0])
        tables.append({"runs": list(dict.fromkeys(names)), "picture": picture, **in_numbers(predictor)})
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
