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

ROOT = Path(__file__).parents[1]
OUTSIDE = ("exps", "src", "docs", "tests", "prompts")
MODULES = "sample, evaluate, common, solvers, backends, digits, generation, rewards, evaluation, training"


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
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder in which the wheel is installed: unpacked, since it has nothing to compile."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
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
    """All packages are the installed ones, and one image comes from a baseline, which needs no predictor."""
    code = f"import sys, {MODULES}; print(*(m.__file__ for m in ({MODULES})), sep='\\n', flush=True)"
    words = sampling("ldm")
    text = run_installed(installed, tmp_path, "-c", f"{code}; sample.main(sys.argv[1:])", *words)
    files = text.split("euler:")[0].splitlines()
    assert len(files) == len(MODULES.split(","))
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert image(tmp_path / "ldm").std() > 0


@pytest.mark.slow
def test_an_installed_wheel_samples_every_family_and_scores(installed, tmp_path):
    for family in ("ldm", "sd3", "flux"):
        run_installed(installed, tmp_path, "-m", "sample", *sampling(family))
        assert image(tmp_path / family).std() > 0
        score = ("score", "--images", family, "--metrics", "digits,judge", "--device", "cpu")
        run_installed(installed, tmp_path, "-m", "evaluate", *score)
    run_installed(installed, tmp_path, "-m", "evaluate", "report", "--run", "sd3", "--run", "flux")
    assert "judge" in (tmp_path / "report.html").read_text()


def sampling(family: str) -> list[str]:
    """The arguments of one image of a family of digits by a baseline."""
    backend = ["--backend", "digits", "--backend-config", f'{{"family": "{family}"}}', "--device", "cpu"]
    return [*backend, *f"--solver euler --num-steps 3 --seeds 0 --no-subdirs --outdir {family}".split()]


def image(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "000000.png"))
