"""The layers, as imports: which package may use which, no module in a cycle, and a core without the heavy
libraries.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {  # a package: what it may import of ours besides itself
    "common": set(),
    "solvers": {"common"},
    "digits": {"common", "backends"},
    "backends": {"common", "solvers", "digits"},
    "rewards": {"common", "solvers", "digits", "backends"},
    "generation": {"common", "solvers", "digits", "backends"},
    "training": {"common", "solvers", "digits", "backends", "rewards", "generation"},
    "evaluation": {"common", "solvers", "digits", "backends", "rewards", "generation"},
    "integrations": {"common", "solvers"},
}
LAYERS["benchmarks"] = set(LAYERS)
NARROW = {  # of the second, the first imports these modules alone
    ("solvers", "common"): {"common.errors", "common.plugins"},
    ("solvers.predictor", "common"): {"common.errors", "common.files", "common.resolution"},
    ("digits", "backends"): {"backends.quiet"},
    ("backends", "digits"): {"digits"},
    ("rewards", "digits"): {"digits", "digits.data", "digits.judge"},
}
SCRIPTS = {"sample", "sample_sd3", "sample_flux", "evaluate"}


def files() -> dict[str, Path]:
    """Every module of ours by dotted name."""
    paths = [p for package in LAYERS for p in sorted((ROOT / package).rglob("*.py"))]
    paths += [ROOT / f"{script}.py" for script in sorted(SCRIPTS)]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    return {name: path for path, name in names.items()}


MODULES = files()


def imports(name: str, nested: bool = True) -> set[str]:
    """The modules that a module imports, ours by the name of their file; with `nested` also those that its
    functions import when they run.
    """
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    used: set[str] = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{above}.{base}".rstrip(".")
            members = {f"{base}.{alias.name}" for alias in node.names}
            used |= {m for m in members if m in MODULES} or {base}
    return used - {name}


def top(name: str) -> str:
    """The package, or library, of a module."""
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_layers(name):
    package = top(name)
    used = {other for other in imports(name) if top(other) in {*LAYERS, *SCRIPTS}} - {package}
    assert not {other for other in used if top(other) in SCRIPTS}, "nothing imports a script"
    if package in LAYERS:
        assert {top(other) for other in used} <= {package, *LAYERS[package]}
        inner = "solvers.predictor" if name.startswith("solvers.predictor") else package
        assert {m for m in used if m not in NARROW.get((inner, top(m)), {m})} == set()


def test_no_module_imports_itself_through_others():
    """Imports at the top of modules make a graph without cycles: sample.py -> generation.commands ->
    generation.request -> backends -> solvers is a one-way street.
    """
    graph = {name: {m for m in imports(name, nested=False) if m in MODULES} for name in MODULES}
    for name, path in MODULES.items():  # a package imports what its __init__ gathers, not the other way round
        if path.name == "__init__.py":
            graph[name] = {m for m in graph[name] if m != name}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")
    street = ["solvers", "backends", "generation.request", "generation.commands", "sample"]
    assert sorted(street, key=order.index) == street


def test_solvers_import_neither_diffusers_nor_transformers():
    for name in MODULES:
        if top(name) == "solvers":
            assert not {top(m) for m in imports(name)} & {"diffusers", "transformers"}


def test_what_runs_a_table_in_another_program_imports_torch_and_diffusers_alone():
    """These files can be copied into another program as they are."""
    executors = {"epd_scheduler", "parallel_points", "sample_epd"}
    allowed = {*sys.stdlib_module_names, "torch", "tqdm", "diffusers"}
    for name in MODULES:
        if top(name) == "integrations" and name.rpartition(".")[2] in executors:
            assert {top(m) for m in imports(name, nested=False)} <= allowed


def test_command_lines_start_before_the_libraries():
    """Help, and what is wrong with an option, need not wait for diffusers."""
    commands = "training.distill.launch, training.ppo.launch, training.ppo.export_epd_predictor"
    heavy = "('diffusers', 'transformers', 'matplotlib', 'tensorboard')"
    code = f"import sys, {', '.join(sorted(SCRIPTS))}, {commands}"
    code += f"; print([n for n in {heavy} if n in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_torchvision_stays_out_of_the_core():
    for name in MODULES:
        if name != "rewards.hps":
            assert not {top(m) for m in imports(name)} & {"torchvision", "open_clip"}
