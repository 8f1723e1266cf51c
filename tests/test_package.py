"""A wheel holds every module and data file of the packages, and works where the checkout is not.

It holds neither exps/ nor tests/: learned tables are named by path, or baselines need none.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
OUTSIDE = ("exps", "prompts", "tests")
MODULES = "import sample, evaluate, common, solvers, backends, rewards, evaluation, training\n"
MODULES += (
    "print(*(m.__file__ for m in (sample, evaluate, common, solvers, backends, rewards, evaluation,"
    " training)), sep='\\n')"
)


def checked_out() -> list[str]:
    """The files of the project that git knows or does not ignore, but for those outside of the packages."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [
        path
        for path in listed
        if (ROOT / path).is_file() and not path.startswith(tuple(f"{folder}/" for folder in OUTSIDE))
    ]


def packaged() -> set[str]:
    """The files of a checkout that a wheel should hold: all modules at its root, and all that is in the
    folder of a package.
    """
    files = checked_out()
    packages = {
        path.split("/")[0] for path in files if path.count("/") == 1 and path.endswith("/__init__.py")
    }
    return {
        path for path in files if path.split("/")[0] in packages or (path.endswith(".py") and "/" not in path)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the checkout, built from a copy of it."""
    root = tmp_path_factory.mktemp("wheel")
    for path in checked_out():
        (root / "project" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, root / "project" / path)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(root / "project")]
    pip(*build)
    (found,) = root.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def pip(*arguments: str) -> None:
    """Run pip without the network."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run([*command, "--no-index"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def run_installed(installed: Path, folder: Path, *arguments: str) -> str:
    """What Python prints in a folder of no project, where only the installed wheel is on its path."""
    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "PYTHONSAFEPATH": "1",
        "PYTHONNOUSERSITE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == packaged()
    assert {
        "digits/sd3/model_index.json",
        "training/ppo/cfgs/sd15.yaml",
        "evaluation/report/report.html.j2",
        "sample.py",
    } <= held


def test_an_installed_wheel_samples(installed, tmp_path):
    files = run_installed(installed, tmp_path, "-c", MODULES).splitlines()
    assert all(Path(file).is_relative_to(installed) for file in files)
    sample(installed, tmp_path, "ldm")


@pytest.mark.slow
def test_an_installed_wheel_samples_every_family_and_scores(installed, tmp_path):
    for family in ("ldm", "sd3", "flux"):
        sample(installed, tmp_path, family)
        run_installed(
            installed,
            tmp_path,
            "-m",
            "evaluate",
            "score",
            "--images",
            family,
            "--metrics",
            "digits,judge",
            "--device",
            "cpu",
        )
    run_installed(installed, tmp_path, "-m", "evaluate", "report", "--run", "sd3", "--run", "flux")
    assert "judge" in (tmp_path / "report.html").read_text()


def sample(installed: Path, folder: Path, family: str) -> None:
    """One image of a family of digits by a baseline, which needs no predictor file."""
    backend = ("--backend", "digits", "--backend-config", f'{{"family": "{family}"}}', "--device", "cpu")
    sampler = ("--solver", "euler", "--num-steps", "3", "--seeds", "0", "--no-subdirs", "--outdir", family)
    run_installed(installed, folder, "-m", "sample", *backend, *sampler)
    assert np.asarray(Image.open(folder / family / "000000.png")).std() > 0
