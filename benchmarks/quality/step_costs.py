"""Seconds and memory of one step of a way to tune a table, in a process of its own."""

import json
import multiprocessing
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch

from training.config import load_config
from training.ppo.config import RDPOConfig
from training.ppo.launch import main

from . import rdpo_runs as runs
from .cma_es import Search

STEPS = 6
# nothing is held out and nothing is written between
BARE = (f"ppo.steps={STEPS}", "evaluation.interval=1000", "evaluation.images=2", "logging.save_interval=1000")


def step_cost(way: str, start: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """The seconds of a step after set-up, and the highest resident memory of the process in MiB.

    Args:
        way: rdpo, by the estimator of the settings, or cma.
        start: the table that is tuned.
        settings: overrides of the configuration.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    child = context.Process(target=measure, args=(sender, way, start, (*settings, *BARE)))
    child.start()
    sender.close()
    cost = receiver.recv()
    child.join()
    return cost


def measure(answer: Connection, way: str, start: Path, settings: tuple[str, ...]) -> None:
    """Run a few steps, and send what they cost."""
    torch.set_num_threads(1)
    seconds = (seconds_of_generations if way == "cma" else seconds_of_a_run)(start, settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    answer.send({"seconds_a_step": seconds, "memory_mib": peak})


def seconds_of_generations(start: Path, settings: tuple[str, ...]) -> float:
    """The median seconds of a generation of CMA-ES, after a first that warms up."""
    config = load_config(RDPOConfig, runs.CONFIG, [f"data.predictor_snapshot={start}", *settings])
    search, took = Search.make(config, 0, 1.0), []
    for number in range(STEPS + 1):
        begin = time.perf_counter()
        search.generation(0, number)
        took.append(time.perf_counter() - begin)
    return median(took[1:])


def seconds_of_a_run(start: Path, settings: tuple[str, ...]) -> float:
    """The median seconds of a step of an RDPO run, after a first that warms up."""
    texts = ["run.seed=0", f"data.predictor_snapshot={start}", *settings]
    overrides = [part for text in texts for part in ("--override", text)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", str(runs.CONFIG), "--output-root", folder, "--run-name", "cost", *overrides]
        main(arguments, standalone_mode=False)
        lines = next(Path(folder).glob("*/logs/seconds.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return median(sum(v for k, v in r.items() if k != "step") for r in records if r["step"] > 1)
