"""Pictures of runs: what they show, and that tensorboard has every number of metrics.jsonl by its name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import figures
from common.distributed import Ranks
from training.distill import plots as distill_plots
from training.log import Log, TensorboardBoard
from training.ppo import plots as ppo_plots
from training.run_folder import RunFolder

NAMES = ["euler", "ipndm2", "dpmpp", "unipc", "heun", "dpm2", "ipndm", "ipndm3", "dpmpp3", "unipc3", "dpm"]
TRAINER = SimpleNamespace(
    student=SimpleNamespace(cost=lambda: SimpleNamespace(depth=6, evaluations=9)),
)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Figure]:
    """The figures that were saved, by the name of their file."""
    kept: dict[str, Figure] = {}
    write = figures.save

    def save(figure: Figure, path: Path) -> None:
        kept[path.name] = figure
        write(figure, path)

    for module in (distill_plots, ppo_plots):
        monkeypatch.setattr(module, "save", save)
    return kept


def run_of(folder: Path, records: list[dict]) -> RunFolder:
    (folder / "logs").mkdir()
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return RunFolder(folder)


def distilled(step: int) -> dict:
    table = {"r": [[0.1, 0.4], [0.2, 0.6]], "w": [[0.5, 0.5], [0.3, 0.7]], "sigmas": [10.0, 1.0, 0.1]}
    return {
        "step": step,
        "heldout": 0.3 - step / 1000,
        "heldout_se": 0.01,
        "baseline": "euler",
        "baseline_heldout": 0.35,
        "table": table,
    }


def curves(*depths: int) -> dict:
    return {depth: {name: (None, torch.rand(8) / depth + 0.1) for name in NAMES} for depth in depths}


def texts(figure: Figure) -> list[str]:
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    return [
        *titles,
        *(axes.get_xlabel() for axes in figure.axes),
        *(axes.get_ylabel() for axes in figure.axes),
    ]


def test_the_table_over_training_says_what_its_panels_are(tmp_path, drawn):
    distill_plots.draw(run_of(tmp_path, [distilled(0), distilled(50)]), TRAINER, curves(6))
    shown = texts(drawn["table.png"])
    assert {"position r (0: first node, 1: next)", "weight w", "noise levels σ", "training step"} <= set(
        shown
    )
    assert "The learned numbers over training" in drawn["table.png"].get_suptitle()
    assert len(drawn["table.png"].axes[0].lines) == 4


def test_one_depth_is_drawn_as_bars(tmp_path, drawn):
    distill_plots.draw(run_of(tmp_path, [distilled(0), distilled(50)]), TRAINER, curves(6))
    left, right = drawn["error.png"].axes
    assert right.get_title(loc="left") == "error at serial depth 6: lower is better"
    assert len(right.patches) == len(NAMES) + 1
    assert "this run, 9 NFE" in [label.get_text() for label in right.get_yticklabels()]
    assert left.get_ylabel() == right.get_xlabel() == "held-out RMSE of latents to the teacher"


def test_several_depths_are_curves_of_different_looks_with_a_legend_beside_them(tmp_path, drawn):
    distill_plots.draw(run_of(tmp_path, [distilled(0), distilled(50)]), TRAINER, curves(4, 6))
    right = drawn["error.png"].axes[1]
    assert {text.get_text() for text in right.get_legend().get_texts()} == {*NAMES, "this run, 9 NFE"}
    containers = [c for c in right.containers if c.get_label() in NAMES]
    assert len({(c[0].get_color(), c[0].get_marker(), c[0].get_linestyle()) for c in containers}) == len(
        NAMES
    )
    assert right.get_legend().get_window_extent().x0 >= right.get_window_extent().x1


def test_rdpo_draws_its_rewards(tmp_path, drawn):
    table = {"table": {"r": [[0.5]], "w": [[1.0]]}}
    records = [
        {"step": 0, "gain_digits": 0.0, "gain_digits_halfwidth": 0.0, **table},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.6},
        {"step": 2, "gain_digits": 0.1, "gain_digits_halfwidth": 0.05, **table},
    ]
    ppo_plots.draw(run_of(tmp_path, records), 2)
    rollouts, gain = drawn["reward.png"].axes
    assert list(rollouts.lines[0].get_ydata()) == [0.5, 0.6]
    assert list(gain.containers[0][0].get_ydata()) == [0.0, 0.1]
    assert gain.get_title(loc="left") == "held-out digits"
    assert gain.get_ylabel() == "gain over the start table (95 %)"
    Image.open(tmp_path / "reward.png").verify()


def test_tensorboard_has_every_number_by_its_name(tmp_path):
    run = run_of(tmp_path, [])
    record = {"step": 3, "loss": 0.5, "skipped": 2, "baseline": "euler", "table": {"r": [[0.5]]}}
    log = Log(run, Ranks(0, 1, torch.device("cpu")), TensorboardBoard(run, 0))
    log(record)
    log.close()
    board = EventAccumulator(str(tmp_path / "logs"))
    board.Reload()
    numbers = {key for key, value in record.items() if isinstance(value, int | float)} - {"step"}
    assert set(board.Tags()["scalars"]) == numbers
    assert board.Scalars("skipped")[0].value == 2
    assert board.Scalars("loss")[0].step == 3
