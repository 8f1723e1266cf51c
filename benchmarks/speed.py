"""The README's figures on speed, from the results of the benchmarks that measured them: python -m benchmarks.speed."""

import json
from pathlib import Path

import click

from solvers.errors import run_command

from . import compile, memory, overhead, parallel, pipelines, points

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "overhead": overhead.summary,
    "memory": memory.summary,
    "points": points.summary,
    "parallel": parallel.summary,
    "pipelines": pipelines.summary,
    "compile": compile.summary,
}


@click.command()
@click.option("--results", type=click.Path(exists=True, file_okay=False, path_type=Path), default=RESULTS, show_default=True)
def main(results: Path) -> None:
    """Print the summary of each result that the folder holds."""
    for name, summary in PARTS.items():
        if (results / f"{name}.json").is_file():
            found = json.loads((results / f"{name}.json").read_text())
            told = {**found["machine"], **found["settings"]}
            click.echo(f"benchmarks.{name} ({', '.join(f'{k} {v}' for k, v in told.items())})\n\n{summary(found['rows'])}\n")


if __name__ == "__main__":
    run_command(main)
