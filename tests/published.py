"""What a user of the published system has: its downloads, and models of the real families' sizes (tiny, with
random weights).
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("backends", "solvers")]

from released import TEXT_TO_IMAGE, write_released  # noqa: E402
from tiny import save_tiny  # noqa: E402
from tiny_flow import save_flux, save_sd3  # noqa: E402

SIZES = {"sd15": 512, "sd3-512": 512, "sd3-1024": 1024, "flux": 1024}
NAMES = [name.removeprefix("exps/") for name in TEXT_TO_IMAGE]


def make_models(folder: Path) -> dict[str, Path]:
    """A pipeline for each backbone, whose own size is the real one's; Stable Diffusion 3's is 1024 whichever
    size is asked for.
    """
    sd3 = save_sd3(folder / "sd3", pixels=1024, patch_size=8)
    return {
        "sd15": save_tiny(folder / "sd15", 512),
        "sd3-512": sd3,
        "sd3-1024": sd3,
        "flux": save_flux(folder / "flux", pixels=1024, heads=1),
    }


def move_in(folder: Path) -> Path:
    """The project in a folder, with the published downloads in its exps/ beside what is tracked there."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("exps", "samples", "demo", "banks", "build"):
            (folder / entry.name).symlink_to(entry)
    for tables in ("sd15", "sd3-512", "sd3-1024", "flux"):
        (folder / "exps" / tables).mkdir(parents=True)
        for ours in (ROOT / "exps" / tables).iterdir():
            (folder / "exps" / tables / ours.name).write_bytes(ours.read_bytes())
    write_released(folder, TEXT_TO_IMAGE)
    return folder


def run(project: Path, command: str, *more: str, **variables: str) -> str:
    """Run a command line in the project's folder as a shell does, on the CPU; what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    told = {
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    line = " ".join([command, *map(shlex.quote, more)])
    done = subprocess.run(
        ["bash", "-c", line], cwd=project, env=os.environ | told, capture_output=True, text=True, timeout=230
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
