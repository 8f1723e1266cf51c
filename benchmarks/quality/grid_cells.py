"""The cells of the digits grid: kind of table, guidance and depth, how each is distilled, and their files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from common.files import write_atomically
from solvers import UserError
from training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "distill" / "cfgs"
GRID, WORK = ROOT / "exps" / "digits" / "grid", ROOT / "build" / "digits-grid"
CONFIGURATIONS, METRICS = "configurations.yaml", "metrics.jsonl"  # of the whole grid
GUIDANCES, DEPTHS = (1.0, 3.0, 7.5), (4, 6, 8, 10)


@dataclass(frozen=True)
class Cell:
    """One table to distil."""

    kind: str
    guidance: float
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind}-g{self.guidance:g}-d{self.depth}"

    def arguments(self, folder: Path) -> list[str]:
        """The configuration of training.distill.launch; a wide tableau starts from the one before it, in the
        folder.
        """
        overrides = [f"guidance_scale={self.guidance}", "evaluation.depths=[]"]
        if self.kind in ("epd", "plugin"):
            order = [f"student.max_order={2 if self.kind == 'plugin' else 1}"]
            return arguments("digits", [*overrides, f"nodes.num_steps={self.depth // 2 + 1}", *order])
        points = int(self.kind[-1])
        overrides += [f"student.depth={self.depth}", f"student.num_points={points}"]
        if self.kind.startswith("wide"):
            narrower = folder / f"{replace(self, kind=WIDE_STARTS[self.kind]).name}.pkl"
            start = [
                f"student.start={os.path.relpath(narrower, ROOT)}",
                "student.widen=true",
                f"student.first_points={points}",
            ]
            # near an optimum a step of Adam harms the more, the more numbers it moves
            lr = min(0.05, 6 / (points * self.depth) ** 2)
            paced = (
                {"lr": lr, "steps": 80, "batch": 32} if points == 2 else {"lr": lr, "steps": 40, "batch": 16}
            )
            pace = [f"train.{k}={v}" for k, v in paced.items()] + [f"train.chunk={paced['batch']}"]
            pace += ["student.moment_damping=0.1", f"evaluation.interval={paced['steps'] // 2}"]
            pace += ["teacher.check=0"]  # the narrower ones had the same teacher
            return arguments("digits_tableau", [*overrides, *start, *pace])
        stages = 1 + points * (self.depth - 1)
        # many stages at high guidance amplify what they are given: smaller steps, as in the file
        steep = self.guidance == 7.5 and stages >= 10
        pace = [] if steep else ["train.lr=0.1", "student.moment_damping=0.1", "train.steps=200"]
        return arguments("digits_tableau", [*overrides, *pace])


def arguments(config: str, overrides: list[str]) -> list[str]:
    """A shipped configuration and overrides as command-line arguments."""
    return [
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        *[part for o in overrides for part in ("--override", o)],
    ]


KINDS = ("epd", "plugin", "tableau1", "tableau2", "wide2", "wide3", "wide4")
WIDE_STARTS = {"wide2": "tableau2", "wide3": "wide2", "wide4": "wide3"}
CELLS = [Cell(kind, g, d) for g in GUIDANCES[::-1] for d in DEPTHS for kind in KINDS]


def distil(cell: Cell, folder: Path, work: Path) -> str:
    """Run one cell to its end; its table goes to `folder`, its configuration and log to its own folder in
    `work`. Returns the line that the run ends with.
    """
    with tempfile.TemporaryDirectory() as exps:
        options = ["--exps", exps, "--run-name", cell.name]
        command = [sys.executable, "-m", "training.distill.launch", *cell.arguments(folder), *options]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"{cell.name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        run = RunFolder(next(Path(exps).glob(f"*-{cell.name}")))
        (work / cell.name).mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / f"{cell.name}.pkl", (run.export / "network-snapshot-export-best.pkl").read_bytes()
        )
        write_atomically(work / cell.name / run.config.name, run.config.read_bytes())
        write_atomically(work / cell.name / run.metrics.name, run.metrics.read_bytes())
    return next(line for line in done.stdout.splitlines() if line.startswith("best table"))


def configurations(folder: Path) -> dict[str, dict]:
    """The resolved configuration of each table of a grid, by its name."""
    path = folder / CONFIGURATIONS
    return (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}


def gather(folder: Path, work: Path) -> None:
    """Add the configurations and logs of the work folders to the grid's files, in the order of the cells; a
    record of the log has the name of its cell first.
    """
    configured, logs = folder / CONFIGURATIONS, folder / METRICS
    old_texts = sections(configured.read_text()) if configured.is_file() else {}
    old_lines: dict[str, list[str]] = {}
    for line in logs.read_text().splitlines() if logs.is_file() else ():
        old_lines.setdefault(json.loads(line)["name"], []).append(line)
    done = [path.parent for path in work.glob(f"*/{METRICS}")]
    for cell in done:
        text = (cell / "resolved_config.yaml").read_text()
        old_texts[cell.name] = f"{cell.name}:\n{textwrap.indent(text, '  ')}"
        lines = (cell / METRICS).read_text().splitlines()
        old_lines[cell.name] = [f'{{"name": "{cell.name}", {line[1:]}' for line in lines]
    order = [c.name for c in CELLS if c.name in old_texts]
    write_atomically(configured, "".join(old_texts[name] for name in order).encode())
    write_atomically(logs, "".join(f"{line}\n" for name in order for line in old_lines[name]).encode())
    for cell in done:
        shutil.rmtree(cell)


def sections(text: str) -> dict[str, str]:
    """The text of each top-level key of a YAML mapping."""
    parts = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return {part.partition(":")[0]: part for part in parts if part}
