"""What the project does, in four parts and a few minutes: python -m benchmarks.demo."""

import time
from pathlib import Path

import click

from backends import load_backend
from common.distributed import process_group
from common.errors import run_command
from solvers import Spec

from ..quality.compare_solvers import FIRST_SEED, TUNING_SEED
from ..quality.teacher_reference import PromptSeeds, TeacherReference
from .families import compare_families
from .learning import distil_now, tune_now
from .setting import DEPTH, GUIDANCE, Setting, announce
from .solvers import compare_solvers

TUNING_IMAGES = 32
NEXT = """\
python sample.py --predictor exps/digits --seeds 0-15     # sample with the best shipped table
./launch.sh distill digits                                # a table of your own, in full
./launch.sh distill my --model FOLDER --steps 8           # one for a pipeline of your own"""


@click.command()
@click.option(
    "--images",
    type=click.IntRange(12),
    default=96,
    show_default=True,
    help="Prompts and seeds of the first part.",
)
@click.option("--device", help="cpu, cuda, mps; CUDA where there is one by default.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Where everything is written.",
)
def main(images: int, device: str | None, out: Path) -> None:
    """Compare solvers, distil a table, tune one on a reward, compare three families: minutes on two cores.

    Teacher trajectories are kept in the output folder: a second run is faster.
    """
    begin = time.perf_counter()
    with process_group(device) as ranks:
        backend = load_backend(Spec(backend="digits"), ranks.device)
        announce(
            1, f"{images} prompts and seeds, depth {DEPTH}, guidance {GUIDANCE:g}: learned against classical"
        )
        reference, tuning = (
            TeacherReference.make(backend, GUIDANCE, PromptSeeds.evaluation(n, seed), keep=out / "teacher")
            for n, seed in ((images, FIRST_SEED), (TUNING_IMAGES, TUNING_SEED))
        )
        setting = Setting(backend, ranks, out, reference, tuning)
        measured = compare_solvers(setting)
        distil_now(setting, measured)
        tune_now(setting)
        report = compare_families(setting)
    minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
    click.echo(f"\n{minutes} min {seconds} s. What to do next:\n{NEXT}\n\nreport: {report.resolve()}")


if __name__ == "__main__":
    run_command(main)
