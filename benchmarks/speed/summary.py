"""The figures of docs/speed.md, from the results of the benchmarks that measured them.

python -m benchmarks.speed
"""

import json
from pathlib import Path

import click

from common.errors import run_command

from ..report import RESULTS
from . import compile, memory, overhead, parallel, pipelines, points

PARTS = {
    "overhead": overhead.summary,
    "memory": memory.summary,
    "points": points.summary,
    "parallel": parallel.summary,
    "pipelines": pipelines.summary,
    "compile": compile.summary,
}
# digits; full-size networks: whole, cut short, cut short with memory kept
KINDS = ("", "_full", "_cut", "_cut_kept")


@click.command()
@click.option(
    "--results",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=RESULTS,
    show_default=True,
)
def main(results: Path) -> None:
    """Print the summary of each result that the folder holds: of the digits, and of full-size networks, whole
    or cut short.
    """
    for name, kind in [(name, kind) for kind in KINDS for name in PARTS]:
        path = results / f"{name}{kind}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            conditions = ", ".join(f"{k} {v}" for k, v in (result["machine"] | result["settings"]).items())
            click.echo(f"benchmarks.speed.{name} ({conditions})\n\n{PARTS[name](result['rows'])}\n")


if __name__ == "__main__":
    run_command(main)
