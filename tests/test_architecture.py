"""The dependency rule: solvers know nothing of ours but common, backends solvers at most, and nothing imports
the scripts.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "common": {"common"},
    "solvers": {"common", "solvers"},
    "backends": {"common", "solvers", "backends"},
    "rewards": {"common", "solvers", "backends", "rewards"},
    "evaluation": {"common", "solvers", "backends", "rewards", "evaluation", "manifest"},
    "training": {"common", "solvers", "backends", "rewards", "training"},
}
SCRIPTS = {"sample", "sample_family", "sample_sd3", "sample_flux", "evaluate"}
OURS = {*LAYERS, *SCRIPTS, "sample_options", "benchmarks", "generation", "manifest", "tests"}
MAY_IMPORT_SCRIPTS = {
    ("sample_family", "sample"),
    ("sample_sd3", "sample_family"),
    ("sample_flux", "sample_family"),
}


def imports(path: Path) -> set[str]:
    """Top-level packages of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & OURS


def files() -> list[Path]:
    found = [p for folder in [*LAYERS, "benchmarks"] for p in sorted((ROOT / folder).rglob("*.py"))]
    return found + sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    top = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if top in LAYERS:
        assert imports(path) <= LAYERS[top]
    used = {(top, name) for name in imports(path) & SCRIPTS if name != top}
    assert used <= MAY_IMPORT_SCRIPTS


def test_solvers_import_neither_diffusers_nor_transformers():
    for path in (ROOT / "solvers").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "diffusers" not in {
            w for line in text.splitlines() if line.startswith(("import", "from")) for w in line.split()
        }


def test_command_lines_are_there_before_the_libraries():
    """Help, and what is wrong with an option, need not wait for diffusers."""
    commands = (
        "sample, sample_sd3, sample_flux, evaluate, training.distill.launch, training.ppo.launch,"
        " training.ppo.export_epd_predictor"
    )
    code = (
        f"import sys, {commands}; print([n for n in ('diffusers', 'transformers', 'matplotlib',"
        " 'tensorboard') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


def test_torchvision_stays_out_of_the_core():
    for path in files():
        if path.relative_to(ROOT).as_posix() != "rewards/hps.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            named = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            named |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
            assert not {n for n in named if n.split(".")[0] in ("torchvision", "open_clip")}
