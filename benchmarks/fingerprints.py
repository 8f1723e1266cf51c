"""Hashes of what a fixed set of commands computes, to show that a change of the code changes no number.

Write them before a change and compare after it, on one machine: python -m benchmarks.fingerprints --out
a.json, then python -m benchmarks.fingerprints --compare a.json. Images, manifests, tables, metrics and scores
count; file names, times and the words of configurations do not.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

from common.errors import run_command
from solvers import UserError, load_predictor

ROOT = Path(__file__).parents[1]
GRID = ROOT / "exps" / "digits" / "grid"
TABLES = {
    "epd": GRID / "epd-g7.5-d6.pkl",
    "plugin": GRID / "plugin-g3-d6.pkl",
    "tableau1": GRID / "tableau1-g7.5-d4.pkl",
    "tableau2": GRID / "tableau2-g7.5-d6.pkl",
    "wide2": GRID / "wide2-g1-d4.pkl",
    "rdpo": ROOT / "exps/digits/best.pkl",
    "sd3": ROOT / "exps/digits-sd3/distilled.pkl",
    "flux": ROOT / "exps/digits-flux/distilled.pkl",
    "start": ROOT / "exps/digits/start.pkl",
}
SOLVERS = ("euler", "heun", "dpm2", "dpm", "ipndm2", "ipndm3", "ipndm", "dpmpp", "dpmpp3", "unipc", "unipc3")
SMALL_BANK = (
    "bank.pairs=32",
    "bank.heldout_pairs=16",
    "bank.shard_size=16",
    "teacher.inner=7",
    "teacher.check=8",
)
SMALL_TRAIN = ("train.steps=4", "train.batch=16", "evaluation.interval=2", "evaluation.tuning_pairs=16")
BASELINES = "evaluation.baselines=[euler,dpmpp]"
SMALL_RDPO = (
    "ppo.steps=3",
    "ppo.rollout_batch_size=16",
    "ppo.minibatch_size=8",
    "evaluation.interval=2",
    "evaluation.images=12",
)


def run(*arguments: str) -> None:
    """Run a command of the project on one thread of the CPU; what it writes goes to its own folder."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


def digest(parts: Sequence[bytes]) -> str:
    """A hash of some bytes, part by part."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


def of_images(folder: Path) -> str:
    """The images of a folder and the lines of its manifest."""
    files = sorted(p for p in folder.rglob("*.png"))
    return digest([(folder / "manifest.jsonl").read_bytes(), *[p.read_bytes() for p in files]])


def of_table(path: Path) -> str:
    """The numbers of a predictor, bit by bit."""
    predictor = load_predictor(path)
    arrays = {k: v for k, v in vars(predictor.table).items() if v is not None} | {
        "sigmas_of_file": predictor.sigmas
    }
    numbers = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in arrays.items()}
    return digest([json.dumps(numbers, sort_keys=True).encode()])


def of_run(folder: Path) -> str:
    """The metrics of a training run and its exported tables."""
    (run_folder,) = folder.iterdir()
    tables = sorted((run_folder / "export").glob("*.pkl"))
    return digest([(run_folder / "logs/metrics.jsonl").read_bytes(), *[of_table(p).encode() for p in tables]])


def of_scores(folder: Path) -> str:
    """The scores of images, line by line."""
    return digest([p.read_bytes() for p in sorted(folder.rglob("scores/*.jsonl"))])


def overrides(texts: Sequence[str]) -> list[str]:
    """Overrides as options."""
    return [part for text in texts for part in ("--override", text)]


def cases(work: Path, tables: dict[str, Path]) -> dict[str, Callable[[], str]]:
    """What is hashed, by name, each with what computes it."""

    def sample(name: str, *arguments: str, script: str = "sample.py") -> str:
        run(script, "--seeds", "0-7", "--outdir", str(work / name), *arguments)
        return of_images(work / name)

    def train(name: str, stage: str, config: str, *texts: str) -> str:
        root = "--exps" if stage == "distill" else "--output-root"
        path = f"training/{stage}/cfgs/{config}.yaml"
        run("-m", f"training.{stage}.launch", "--config", path, root, str(work / name), *overrides(texts))
        return of_run(work / name)

    def scores() -> str:
        run("evaluate.py", "score", "--images", str(work / "sample epd"), "--metrics", "digits,judge")
        return of_scores(work / "sample epd")

    bank = f"bank.folder={work / 'banks'}"
    distill = (bank, *SMALL_BANK, *SMALL_TRAIN, BASELINES)
    learned = {name: path for name, path in tables.items() if name not in ("sd3", "flux")}
    computations = {
        f"sample {name}": lambda n=name: sample(f"sample {n}", "--predictor-path", str(tables[n]))
        for name in learned
    }
    for name in SOLVERS:
        computations[f"solver {name}"] = lambda n=name: sample(
            f"solver {n}", "--solver", n, "--num-steps", "7"
        )
    computations |= {
        "finish": lambda: sample(
            "finish", "--solver", "dpmpp", "--num-steps", "5", "--finish", "denoise", "--grid"
        ),
        "gaussian": lambda: sample(
            "gaussian", "--backend", "gaussian", "--solver", "heun", "--num-steps", "5", "--prompt", "a"
        ),
        "sd3": lambda: sample(
            "sd3", "--predictor", str(tables["sd3"]), "--prompt", "a handwritten 7", script="sample_sd3.py"
        ),
        "flux": lambda: sample(
            "flux", "--predictor", str(tables["flux"]), "--prompt", "a handwritten 7", script="sample_flux.py"
        ),
        "distill table": lambda: train("distill", "distill", "digits", *distill),
        "distill tableau": lambda: train("tableau", "distill", "digits_tableau", *distill),
        "distill sd3": lambda: train("distill-sd3", "distill", "digits_sd3", *distill),
        "rdpo table": lambda: train(
            "rdpo", "ppo", "digits", f"data.predictor_snapshot={tables['epd']}", *SMALL_RDPO
        ),
        "rdpo mlp": lambda: train(
            "mlp",
            "ppo",
            "digits",
            f"data.predictor_snapshot={tables['start']}",
            "ppo.policy=mlp",
            *SMALL_RDPO,
        ),
        "evaluation": scores,
    }
    return computations


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Write the hashes to a JSON file.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path, exists=True),
    help="Compare with such a file; exit status 1 for a difference.",
)
def main(out: Path | None, compare: Path | None) -> None:
    """Hash what a fixed set of commands computes; a few minutes."""
    before = {} if compare is None else json.loads(compare.read_text())
    hashes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, compute in cases(Path(folder), TABLES).items():
            hashes[name] = compute()
            verdict = (
                ""
                if name not in before
                else " same"
                if before[name] == hashes[name]
                else f" differs from {before[name]}"
            )
            click.echo(f"{hashes[name]}  {name}{verdict}")
        hashes |= {f"table {name}": of_table(path) for name, path in TABLES.items()}
    if out is not None:
        out.write_text(json.dumps(hashes, indent=1) + "\n")
    different = [name for name, value in before.items() if hashes.get(name) != value]
    if compare is not None:
        click.echo(
            f"{len(before) - len(different)} of {len(before)} are the same"
            + (f"; different: {different}" if different else "")
        )
        sys.exit(1 if different else 0)


if __name__ == "__main__":
    run_command(main)
