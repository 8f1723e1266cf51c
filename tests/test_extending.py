"""docs/extending.md, carried out: its files join the packages, its lines the registries, and what they add is
used.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rewards
from backends import load_backend, registry
from common import plugins
from common.errors import UserError
from generation.generate import run_request
from generation.output import Output
from generation.request import PromptOptions, SamplingRequest
from rewards import load_reward
from solvers import BASELINES, Predictor, SolverTable, Spec, load_predictor, polynomial, save_predictor
from solvers.predictor import kinds
from solvers.predictor.__main__ import main as predictor_command
from training.distill.launch import main as distill
from training.distill.students import STUDENTS

from .generation.command import invoke, manifest, pixels, refused

sys.path.insert(0, str(Path(__file__).parent / "solvers"))
from orders import STEPS, TOLERANCE, edm, measured_order

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# ([^\n]+)\n(.*?)```", PAGE, flags=re.DOTALL))
RED = [1.0, 0.0, 0.0]
DISTILLATION = """
backend: {name: gaussian}
guidance_scale: 1.0
nodes: {num_steps: 7, schedule: polynomial}
student: {kind: dpm2_table, start: equal}
teacher: {inner: 15, check: 0}
bank: {folder: banks, prompts: prompts.txt, pairs: 16, heldout_pairs: 16}
train: {steps: 8, batch: 16, chunk: 16, lr: 0.3}
evaluation: {interval: 4, baselines: [euler], schedules: [polynomial], tuning_pairs: 8, depths: [12]}
"""


class Project:
    """The packages with the page's files in them, for one test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch

    def write(self, path: str):
        """Write a file of the page, and import it as the module that it is in the project."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(BLOCKS[path], encoding="utf-8")
        parent = ".".join(Path(path).parent.parts)
        package = importlib.import_module(parent)
        self.monkeypatch.setattr(package, "__path__", [*package.__path__, str(file.parent)])
        name = f"{parent}.{file.stem}"
        self.monkeypatch.setitem(sys.modules, name, None)  # so that it is taken out again
        del sys.modules[name]
        return importlib.import_module(name)

    def register(self, block: str, entries: dict, **names: object) -> None:
        """Add a line of the page to a registry: an entry, or an object that has its name."""
        line = BLOCKS[block].strip()
        if line.startswith('"'):
            added = eval(f"{{{line}}}", names)
        else:
            value = eval(line, names)
            added = {value.name: value}
        assert not added.keys() & entries.keys()
        for name, value in added.items():
            self.monkeypatch.setitem(entries, name, value)


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path / "project", monkeypatch)


@pytest.fixture
def colours(project):
    """The page's backbone, in its registry."""
    project.write("backends/colours.py")
    project.register("backends/registry.py, in MODULES", registry.MODULES)


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """A folder of the user's with the backbone and the solver in one file, and nothing allowed yet."""
    code = BLOCKS["backends/colours.py"] + BLOCKS["solvers/midpoint.py"]
    (tmp_path / "my_extension.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_allowed", set())
    yield tmp_path
    sys.modules.pop("my_extension", None)


def colour_of(folder: Path) -> list[float]:
    """The mean colour of a folder's images, from 0 to 1."""
    return (np.stack(list(pixels(folder).values())).mean((0, 1, 2)) / 255).round(1).tolist()


def test_a_backbone_is_a_module_and_a_line(tmp_path, colours):
    request = SamplingRequest(backend="colours", solver="heun", num_steps=8, finish="denoise")
    run_request(request, [0, 1, 2], PromptOptions("red", None), "cpu", Output(tmp_path / "out"))
    assert colour_of(tmp_path / "out") == pytest.approx(RED, abs=0.11)
    assert manifest(tmp_path / "out")[0]["backbone"] == "colours: colours of standard deviation 0.3"


def test_its_options_are_checked_and_a_learned_table_records_it(tmp_path, colours):
    with pytest.raises(UserError, match="standard deviation of a pixel"):
        load_backend(Spec(backend="colours", backend_config={"std": "wide"}), "cpu")
    backend = load_backend(Spec(backend="colours", backend_config={"std": 0.1}), "cpu")
    spec = Spec(backend="colours", num_steps=4, guidance_rate=3.0, schedule_type="polynomial")
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, backend.sigmas(spec)), tmp_path / "p.pkl")
    assert load_predictor(tmp_path / "p.pkl").spec.backend == "colours"


def test_a_solver_is_a_class_a_line_and_its_order(tmp_path, project):
    midpoint = project.write("solvers/midpoint.py").Midpoint
    project.register("solvers/baselines.py, in BASELINES", BASELINES, Midpoint=midpoint)
    ((_, make, order),) = [
        eval(BLOCKS["tests/solvers/test_convergence.py, in ONE_STEP"], {"Midpoint": midpoint})
    ]
    assert measured_order(make, edm, STEPS) == pytest.approx(order, abs=TOLERANCE)
    request = SamplingRequest(backend="gaussian", solver="midpoint", num_steps=4)
    run_request(request, [0], PromptOptions("x", None), "cpu", Output(tmp_path / "out"))
    assert (manifest(tmp_path / "out")[0]["solver"], manifest(tmp_path / "out")[0]["depth"]) == (
        "midpoint",
        6,
    )


def test_a_reward_is_a_class_and_a_line(project):
    project.write("rewards/redness.py")
    project.register("rewards/registry.py, in CLASSES", rewards.registry.CLASSES)
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = images[1, 2] = 1
    reward = load_reward("redness", {"scale": 2.0}, "cpu")
    assert reward(images, ["", ""]).tolist() == [2.0, -1.0]
    assert reward.protocol()["options"] == {"scale": 2.0}
    with pytest.raises(UserError, match="unknown option 'scales'"):
        load_reward("redness", {"scales": 2.0}, "cpu")


def test_a_learned_solver_is_four_files(tmp_path, project, monkeypatch):
    """It is distilled, exported, shown and sampled."""
    added = {"DPM2Table": project.write("solvers/dpm2_table.py").DPM2Table}
    exec(BLOCKS["solvers/predictor/kinds.py"], namespace := vars(kinds) | added)
    project.register("solvers/predictor/kinds.py, in KINDS", kinds.KINDS, **namespace)
    student = project.write("training/distill/students/dpm2_table.py")
    project.register("training/distill/students/__init__.py, in STUDENTS", STUDENTS, **vars(student))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(DISTILLATION)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(20)))
    invoke("--config run.yaml --run-name toy --exps exps --device cpu", command=distill)
    (run,) = (tmp_path / "exps").iterdir()
    records = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    errors = [r["heldout"] for r in records if "heldout" in r]
    assert errors[-1] < errors[0] / 2
    assert "dpm2_table" in invoke("show", run, command=predictor_command)
    text = invoke(f"--predictor {run} --seeds 0 --prompt x --device cpu --outdir out")
    assert "dpm2_table from " in text
    assert "serial depth 12, 12 evaluations" in text


def test_own_code_is_named_on_the_command_line(own_files):
    run = "--backend my_extension:FAMILY --num-steps 8 --finish denoise --prompt red --seeds 0-2 --device cpu"
    invoke(f"{run} --solver my_extension:Midpoint --outdir out")
    assert colour_of(own_files / "out") == pytest.approx(RED, abs=0.11)
    record = manifest(own_files / "out")[0]
    assert (record["solver"], record["evaluations"]) == ("my_extension:Midpoint", 15)
    assert "is a Family, expected a Solver" in refused(f"{run} --solver my_extension:FAMILY")
    assert "cannot be loaded" in refused(f"{run} --solver my_extension:Missing")


def test_own_code_is_not_run_because_a_file_names_it(own_files):
    spec = Spec(backend="my_extension:FAMILY", num_steps=4, guidance_rate=1.0, schedule_type="polynomial")
    save_predictor(Predictor(SolverTable.uniform(3, 2), spec, polynomial(4, 0.02, 10.0)), Path("p.pkl"))
    run = "--predictor p.pkl --prompt red --seeds 0 --device cpu --outdir out"
    assert "would run code of my_extension.py" in refused(run)
    assert "my_extension" not in sys.modules
    invoke(f"{run} --backend my_extension:FAMILY")
    assert colour_of(own_files / "out")[0] > 0.8
