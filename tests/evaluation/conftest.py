"""What the tests of evaluation share: folders of images with a manifest, scored in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import evaluate
from digits.data import evaluation_prompts
from solvers import UserError

BASELINE = {
    "solver": "dpmpp",
    "predictor": None,
    "depth": 6,
    "evaluations": 6,
    "guidance": 7.5,
    "guidance_rows": 2,
}


class Evaluation:
    """evaluate.py in this process, on folders that it makes."""

    def run(self, *arguments: object) -> str:
        """What the command line prints; errors come out as they are."""
        result = CliRunner().invoke(evaluate.main, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, *arguments: object) -> str:
        """The one line with which the command line refuses its arguments."""
        with pytest.raises(UserError) as error:
            self.run(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    def make(self, folder: Path, seeds=range(8), light: float = 1.0, size: int = 32, **settings) -> Path:
        """Random images, darker for less light, of the digits prompts: two seeds a prompt."""
        folder.mkdir(parents=True)
        prompts = evaluation_prompts(40)
        records = []
        for seed in seeds:
            pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3)) * light
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{seed:06d}.png")
            records.append(
                {"file": f"{seed:06d}.png", "seed": seed, "prompt": prompts[seed // 2]} | BASELINE | settings
            )
        self.write_manifest(folder, records)
        return folder

    def write_manifest(self, folder: Path, records: list[dict]) -> None:
        (folder / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def score(self, folder: Path, *arguments: object, metrics: str = "digits,judge") -> str:
        return self.run("score", "--images", folder, "--metrics", metrics, "--device", "cpu", *arguments)

    def lines(self, folder: Path, metric: str) -> list[dict]:
        return [json.loads(line) for line in (folder / f"scores/{metric}.jsonl").read_text().splitlines()]

    def summary(self, folder: Path, metric: str) -> dict:
        return json.loads((folder / f"scores/{metric}.summary.json").read_text(), parse_constant=pytest.fail)

    def contents(self, folder: Path) -> dict[str, bytes]:
        """Everything below the scores of a folder."""
        return {p.name: p.read_bytes() for p in sorted((folder / "scores").iterdir())}


@pytest.fixture(scope="session")
def evaluation() -> Evaluation:
    return Evaluation()


@pytest.fixture(scope="session")
def scored(evaluation, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs on the same prompts and seeds, scored with digits and judge; not to be written to."""
    root = tmp_path_factory.mktemp("runs")
    runs = (
        evaluation.make(root / "first"),
        evaluation.make(root / "second", light=0.6, solver="unipc", depth=8, evaluations=8),
    )
    for run in runs:
        evaluation.score(run)
    return runs
