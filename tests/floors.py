"""Try the project with the lowest version of each dependency that pyproject.toml allows: ./launch.sh floors.

Every `name>=version` of pyproject.toml is installed as `name==version` into .venv-floors; what these need in
turn has the newest version that fits. Then all modules are imported, and each stage runs for a moment on the
digits. Their judge must read the images: weights that a version does not find in a file are random in it,
which is no error.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-floors"
PYTHON = VENV / "bin" / "python"
TABLES = {
    "digits": "exps/digits/distilled.pkl",
    "digits-sd3": "exps/digits-sd3",
    "digits-flux": "exps/digits-flux",
}
# mean log probability of what the prompt names: 0 to -0.5 for these, -7 where the text encoder's weights are
# random
READABLE = -1.5
PACKAGES = (
    "common",
    "solvers",
    "backends",
    "digits",
    "generation",
    "rewards",
    "evaluation",
    "training",
    "benchmarks",
)
OTHER_PROGRAMS = ("docs", "k-diffusion")  # extras that render pages, or that only a comparison needs
DISTILLATION = (
    "bank.folder={folder}/banks",
    "bank.pairs=32",
    "bank.heldout_pairs=32",
    "bank.shard_size=32",
    "teacher.check=0",
)
DISTILLATION += (
    "train.steps=2",
    "train.batch=16",
    "evaluation.interval=2",
    "evaluation.depths=[]",
    "evaluation.tuning_pairs=16",
)
RDPO = (
    "ppo.steps=2",
    "ppo.rollout_batch_size=4",
    "ppo.minibatch_size=4",
    "evaluation.images=8",
    "evaluation.interval=2",
)
IMPORTS = f"""
import importlib, pkgutil
for package in {PACKAGES}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
import diffusers, transformers
print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
"""


def pinned(project: dict) -> list[str]:
    """Every dependency of a [project] table, those of the extras that run it too, at its lowest version."""
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in OTHER_PROGRAMS}
    texts = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    others = sorted({text for text in texts if not text.startswith(f"{project['name']}[")})
    if odd := [text for text in others if not re.fullmatch(r"[\w.-]+>=[\d.]+", text)]:
        sys.exit(
            f"error: pyproject.toml: dependency {odd[0]!r} has no lowest version; write it as name>=version"
        )
    return [text.replace(">=", "==") for text in others]


def install(pins: list[str]) -> None:
    """Make .venv-floors anew, unless it has these versions already."""
    stamp = VENV / ".complete"
    if stamp.is_file() and stamp.read_text() == "\n".join(pins):
        return
    run(sys.executable, "-m", "venv", "--clear", str(VENV))
    run(str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins)
    stamp.write_text("\n".join(pins))


def smoke_test(folder: Path) -> None:
    """All modules, then sampling, scoring, distillation and RDPO of the digits in a folder; the first failure
    ends it.
    """
    run(str(PYTHON), "-c", IMPORTS)
    for name, table in TABLES.items():
        images = ("--seeds", "0-15", "--device", "cpu", "--outdir", str(folder / name))
        run(str(PYTHON), "sample.py", "--predictor-path", table, *images)
        run(
            str(PYTHON),
            "evaluate.py",
            "score",
            "--images",
            str(folder / name),
            "--metrics",
            "digits,judge",
            "--device",
            "cpu",
        )
        check_readable(folder / name / "scores" / "judge.summary.json")
    if shutil.which("c++") or shutil.which("g++"):
        table, compiled = (
            ("--predictor-path", TABLES["digits"]),
            ("--compile", "--seeds", "0", "--device", "cpu"),
        )
        run(str(PYTHON), "sample.py", *table, *compiled, "--outdir", str(folder / "compiled"))
    run(
        str(PYTHON),
        "evaluate.py",
        "report",
        "--run",
        str(folder / "digits"),
        "--out",
        str(folder / "report.html"),
    )
    train("distill", "--exps", folder, DISTILLATION)
    train("ppo", "--output-root", folder, RDPO)


def check_readable(summary: Path) -> None:
    """End with an error where the judge does not see in the images what their prompts name."""
    mean = json.loads(summary.read_text(encoding="utf-8"))["mean"]
    if mean < READABLE:
        sys.exit(
            f"error: the judge gives {mean:.3g} to {summary.parent.parent.name}, expected at least"
            f" {READABLE}; raise a lowest version"
        )


def train(stage: str, option: str, folder: Path, overrides: tuple[str, ...]) -> None:
    """A training run of two steps."""
    changed = [argument for text in overrides for argument in ("--override", text.format(folder=folder))]
    command = (
        str(PYTHON),
        "-m",
        f"training.{stage}.launch",
        "--config",
        f"training/{stage}/cfgs/digits.yaml",
        "--run-name",
        "floors",
    )
    run(*command, option, str(folder), "--device", "cpu", *changed)


def run(*command: str) -> None:
    """Run a command in the project's root; when it fails, end with its exit status."""
    print(
        "+", " ".join(command) if command[1] != "-c" else f"{command[0]} -c (import everything)", flush=True
    )
    if status := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(status)


if __name__ == "__main__":
    install(pinned(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]))
    with TemporaryDirectory() as folder:
        smoke_test(Path(folder))
    print("the lowest versions work")
