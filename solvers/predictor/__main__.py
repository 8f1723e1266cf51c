"""Look at predictor files and convert published ones: python -m solvers.predictor."""

from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import click

from common.errors import note, printable, run_command

from . import Predictor, PredictorError, load_predictor, resolve_predictor_path, save_predictor


def describe(predictor: Predictor) -> str:
    """Spec, cost, nodes and table of a predictor as text."""
    spec = predictor.spec
    lines = [
        f"{name:16} {printable(str(value))}"
        for name, value in asdict(spec).items()
        if value not in (None, {})
    ]
    nodes, cost = predictor.sigmas, predictor.cost()
    if nodes is None:
        lines.append(f"{'nodes':16} not stored; made from the schedule by the backend")
    lines.append(
        f"{'cost':16} serial depth {cost.depth}, {cost.evaluations} evaluations an image (guidance apart)"
    )
    lines += [printable(f"{'provenance.' + k:16} {v}") for k, v in predictor.provenance.items()]
    numbers = predictor.kind.describe(predictor.table, nodes)
    return "\n".join([*lines, *([numbers] if numbers else [])])


@click.group()
def main() -> None:
    """Predictor files: learned solver tables."""


@main.command()
@click.argument("file")
def show(file: str) -> None:
    """Print the table and the settings of FILE (a .pkl, a run folder, or a name under exps)."""
    path = resolve_predictor_path(file)
    predictor = load_predictor(path)
    for text in predictor.notices():
        note(text)
    click.echo(f"{path}\n{describe(predictor)}")


@main.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
def convert(source: str, target: Path, force: bool) -> None:
    """Write SOURCE (own or published format) to TARGET in the own format, which holds plain data only."""
    if target.exists() and not force:
        raise PredictorError(f"{target} exists; give --force to replace it")
    predictor = load_predictor(resolve_predictor_path(source))
    for text in predictor.notes:
        note(text)
    save_predictor(predictor, target)
    click.echo(f"wrote {target}")


@main.command()
@click.argument("predictors", nargs=-1, required=True, metavar="PREDICTOR...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path), required=True, help="Pipeline folder that will use them."
)
@click.option("--pipeline", is_flag=True, help="Write a copy of the whole pipeline, not its scheduler alone.")
def to_diffusers(predictors: tuple[str, ...], out: Path, model: Path, pipeline: bool) -> None:
    """Write PREDICTOR... as a diffusers scheduler folder OUT, with a model card."""
    for name in predictors:
        for text in load_predictor(resolve_predictor_path(name)).notices():
            note(f"{name}: {text}")
    scheduler = import_module("integrations.diffusers.export").export(predictors, model, out, pipeline)
    click.echo(f"wrote {out}: num_inference_steps {', '.join(sorted(scheduler.config.tables, key=int))}")


@main.command()
@click.argument("predictors", nargs=-1, required=True, metavar="PREDICTOR...")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--model", type=click.Path(path_type=Path), help="Pipeline folder, for predictors that record no nodes."
)
def to_comfyui(predictors: tuple[str, ...], out: Path, model: Path | None) -> None:
    """Write PREDICTOR... as JSON tables to OUT; where that is a ComfyUI installation, with the node that
    reads them.
    """
    export = import_module("integrations.comfyui_export").export
    for file in export(
        predictors, out, model and import_module("integrations.tables").scheduler_config(model)
    ):
        click.echo(f"wrote {file}")


if __name__ == "__main__":
    run_command(main)
