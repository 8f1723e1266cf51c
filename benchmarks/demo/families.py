"""Part 4: three backbone families, each with its learned tables, baselines and teacher, in one report."""

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import click
from tqdm import tqdm

from common.prompts import parse_seeds
from evaluation.comparison import load_runs
from evaluation.images import read_image_set
from evaluation.provenance import find_predictors, training_of
from evaluation.report.page import write_report
from evaluation.scoring import Metric, score_images
from evaluation.suite_runs import SuitePlan, plan_suite
from evaluation.verdicts import verdict_lines
from generation.generate import run_request
from generation.output import Output
from generation.request import PromptOptions, SamplingRequest
from rewards import load_reward

from .setting import Setting, announce

NAMES = {"digits": "polynomial", "digits-sd3": "flowmatch", "digits-flux": "flowmatch"}
"""The evaluations, and the schedule of their teacher."""
SEEDS, TEACHER_NODES, BATCH = "0-47", 33, 48
BASELINES = ("euler", "ipndm2", "dpmpp")
METRICS = ["digits", "judge"]


def compare_families(setting: Setting) -> Path:
    """Sample, score and compare the families; the path of the report."""
    announce(4, "the same in three families: Stable Diffusion 1, Stable Diffusion 3 and FLUX.1 layouts")
    plans = {
        name: plan_suite(name, BASELINES, None, {"SEEDS": SEEDS, "OUTDIR": str(setting.out / name)})
        for name in NAMES
    }
    runs = [request for name, plan in plans.items() for request in requests_of(name, plan)]
    predictors, device = find_predictors(None), str(setting.ranks.device)
    metrics = [Metric(name, load_reward(name, {}, setting.ranks.device), BATCH) for name in METRICS]
    for outdir, request in tqdm(runs, desc="families", unit="run", disable=None):
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # what is printed of each run
            output = Output(outdir, BATCH)
            run_request(request, parse_seeds(SEEDS), PromptOptions(None, None), device, output)
            images = read_image_set(outdir, None)
            for metric in metrics:
                score_images(images, metric, training_of(images.settings, predictors), setting.ranks)
    for name, plan in plans.items():
        folders = [plan.outdir / run.name for run in plan.runs if "rdpo" not in run.name]  # part 3 has it
        lines = verdict_lines(load_runs(folders, METRICS[:1]), predictors)
        click.echo("\n".join([f"{name}:", *lines]))
    report, teachers = setting.out / "report.html", [plan.outdir / "teacher" for plan in plans.values()]
    write_report(
        load_runs([outdir for outdir, _ in runs], METRICS),
        predictors,
        report,
        "Three families of digits",
        teachers,
    )
    return report


def requests_of(name: str, plan: SuitePlan) -> list[tuple[Path, SamplingRequest]]:
    """The folders of a family and what is sampled into them, the teacher's last."""
    requests = []
    for run in plan.runs:
        options = dict(zip(run.arguments[::2], run.arguments[1::2], strict=True))
        request = SamplingRequest(options["--predictor-path"], options.get("--solver", "epd"))
        if "--num-steps" in options:
            request = replace(request, num_steps=int(options["--num-steps"]))
        requests.append((plan.outdir / run.name, request))
    path = requests[0][1].predictor_path
    fine = SamplingRequest(path, "dpm2", num_steps=TEACHER_NODES, schedule=NAMES[name])
    return [*requests, (plan.outdir / "teacher", fine)]
