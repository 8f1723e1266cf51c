"""Which solver gives better images at the same cost, from sampling to the report: python -m evaluation.suite
NAME.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

import common.records as manifest
from common.errors import run_command
from rewards import NAMES, check_reward
from solvers import UserError

from .comparison import Run, comparison_table, comparisons, load_runs
from .provenance import find_predictors
from .report.page import write_report
from .scores import ScoresError, read_scores
from .suite_runs import SuitePlan, SuiteRun, plan_suite, preset_of
from .tables import interval_footnote, text_table, with_interval
from .verdicts import verdict_lines

ROOT = Path(__file__).parent.parent


@click.command()
@click.argument("name")
@click.option(
    "--metrics",
    help=f"One or more of {', '.join(NAMES)}, with commas; default: digits,judge for digits, else hps,clip.",
)
@click.option(
    "--baselines",
    default="euler,ipndm2,dpmpp,unipc",
    show_default=True,
    help="What the learned tables are compared with.",
)
@click.option(
    "--batch", type=click.IntRange(1), help="Images in a batch; by default what suits the backbone."
)
@click.option("--device", help="cpu, cuda, mps; CUDA where there is one by default.")
def main(name: str, metrics: str | None, baselines: str, batch: int | None, device: str | None) -> None:
    """Sample a prompt file with learned tables and with baselines of the same serial depth and of the same
    total evaluations, score all, compare them with the first table, and write the report. Run again, it goes
    on where it stopped.

    NAME is sd15, sd3-512, sd3-1024, flux, digits, digits-sd3 or digits-flux. Of the environment it takes
    PROMPT_FILE, SEEDS, OUTDIR, MODEL_ID (FLUX_MODEL_PATH), the learned table as PREDICTOR, RUN_DIR or
    RUN_NAME, and PROCESSES for torchrun.
    """
    launcher = launcher_of(os.environ)
    chosen = split(metrics if metrics is not None else preset_of(name).metrics)
    check_metrics(chosen)
    plan = plan_suite(name, split(baselines), batch, os.environ)
    on = [] if device is None else ["--device", device]
    for run in plan.runs:
        if not sampled(plan, run):
            options = (*plan.shared, *run.arguments, "--outdir", plan.outdir / run.name, *on)
            call(launcher, "sample.py", *options)
    folders = [plan.outdir / run.name for run in plan.runs]
    if unscored := [f for f in folders if not all(scored(plan, f, metric) for metric in chosen)]:
        images = [argument for folder in unscored for argument in ("--images", folder)]
        exps = [argument for folder in plan.exps for argument in ("--exps", folder)]
        call(launcher, "evaluate.py", "score", *images, "--metrics", ",".join(chosen), *exps, *on)
    runs = load_runs(folders, chosen)
    differences = comparison_table(runs, comparisons(runs))
    click.echo(f"\n{scores_table(runs)}\n\ndifferences to {runs[0].name}\n\n{differences}")
    report, predictors = plan.outdir / "report.html", find_predictors(plan.exps)
    write_report(runs, predictors, report, f"Solvers on {name}")
    click.echo("\n" + "\n".join(verdict_lines(runs, predictors)))
    click.echo(f"\nreport: {report}")


def split(text: str) -> list[str]:
    """The names between the commas of a text, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse metrics that cannot be computed, before any image is made."""
    for metric in metrics:
        if metric not in NAMES:
            raise UserError(f"--metrics: {metric!r} is no metric, expected one or more of {', '.join(NAMES)}")
        for note in check_reward(metric, {}):
            click.echo(f"note: {note}", err=True)


def launcher_of(environment: Mapping[str, str]) -> list[str]:
    """How a script is started on PROCESSES devices: python, or torchrun for more than one."""
    count = environment.get("PROCESSES") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"PROCESSES {count!r}: expected the number of devices to use, such as 4")
    if int(count) == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


def call(launcher: Sequence[str], script: str, *arguments: object) -> None:
    """Run a script of this project to its end, or end with its exit status; it is ended when this
    process is.
    """
    with subprocess.Popen([*launcher, str(ROOT / script), *map(str, arguments)]) as process:
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status:
        sys.exit(status)


def sampled(plan: SuitePlan, run: SuiteRun) -> bool:
    """Whether a folder holds exactly the images that are asked for; sample.py is called where in doubt."""
    folder = plan.outdir / run.name
    path = folder / manifest.NAME
    if manifest.parts_of(path):
        return False
    records = manifest.read_records(path)
    same = all(r | run.settings == r and manifest.is_intact(folder, r) for r in records)
    return same and [(r["seed"], r["prompt"]) for r in records] == plan.pairs


def scored(plan: SuitePlan, folder: Path, metric: str) -> bool:
    """Whether the images of a folder are all scored with a metric."""
    try:
        lines = read_scores(folder, metric).lines
    except ScoresError:
        return False
    return [(line["seed"], line["prompt"]) for line in lines] == plan.pairs


def scores_table(runs: Sequence[Run]) -> str:
    """Costs and mean scores of all runs as a Markdown table."""
    header = ["run", "serial depth", "evaluations", *(f"{metric} [95 %]" for metric in runs[0].scores)]
    rows = []
    for run in runs:
        means = [with_interval(s.summary["mean"], s.summary["interval"]) for s in run.scores.values()]
        rows.append([run.name, str(run.settings["depth"]), str(run.settings["evaluations"]), *means])
    methods = [scores.summary.get("method") for run in runs for scores in run.scores.values()]
    return text_table(header, rows) + interval_footnote(methods)


def stop(*_) -> None:
    """End with the status of a terminated process, so that what was called ends as well."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run_command(main)
