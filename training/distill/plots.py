"""Pictures of a distillation run: its table over training, and its error among the baselines'."""

from collections.abc import Sequence

from torch import Tensor

from common.figures import SOFT, TEXT, look, save, styled

from ..run_folder import RunFolder
from .baselines import Baseline, standard_error
from .trainer import DistillTrainer

Curves = dict[int, dict[str, tuple[Baseline, Tensor]]]
TITLES = {
    "r": "position r (0: first node, 1: next)",
    "w": "weight w",
    "scale_dir": "factor on the velocity (scale_dir)",
    "scale_time": "factor on the noise level (scale_time)",
    "sigmas": "noise levels σ",
    "output": "weights of the result",
}
ERROR = "held-out RMSE of latents to the teacher"


def draw(run: RunFolder, trainer: DistillTrainer, curves: Curves) -> None:
    """Write table.png and error.png into the run's folder."""
    evaluations = [r for r in run.records() if "table" in r and "heldout_se" in r]
    if evaluations:
        styled(lambda: draw_table(run, evaluations))
        styled(lambda: draw_error(run, trainer, evaluations, curves))


def draw_table(run: RunFolder, evaluations: Sequence[dict]) -> None:
    """Every array of the table against the step, from the first number (dark) to the last (light)."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    names = list(evaluations[0]["table"])
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)
    steps = [r["step"] for r in evaluations]
    marker = "o" if len(steps) < 3 else None
    for axes, name in zip(grid[0], names, strict=True):
        rows = [flat(r["table"][name]) for r in evaluations]
        last = max(1, len(rows[0]) - 1)
        for i, line in enumerate(zip(*rows, strict=True)):
            axes.plot(steps, line, lw=1, marker=marker, ms=3, color=colormaps["viridis"](0.9 * i / last))
        axes.set(title=TITLES.get(name, name), xlabel="training step")
        axes.set(yscale="log" if name == "sigmas" else "linear")
    bar = ScalarMappable(Normalize(0, 1), colormaps["viridis"])
    legend = figure.colorbar(bar, ax=grid[0, -1], ticks=[0, 1])
    legend.set_ticklabels(["first\ninterval", "last"])
    figure.suptitle("The learned numbers over training", x=0.01, ha="left", fontsize=12)
    save(figure, run.path / "table.png")


def flat(values) -> list[float]:
    """Nested lists as one."""
    return [v for part in values for v in flat(part)] if isinstance(values, list) else [values]


def draw_error(run: RunFolder, trainer: DistillTrainer, evaluations: Sequence[dict], curves: Curves) -> None:
    """Held-out error against the step, and against serial depth among the baselines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_steps(left, evaluations)
    best = min(evaluations, key=lambda r: r["heldout"])
    cost = trainer.student.cost()
    student = (cost.depth, best, f"this run, {cost.evaluations} NFE")
    (draw_bars if len(curves) == 1 else draw_depths)(right, curves, student)
    save(figure, run.path / "error.png")


def draw_steps(axes, evaluations: Sequence[dict]) -> None:
    """Held-out error over training, and the best baseline's."""
    axes.errorbar(
        [r["step"] for r in evaluations],
        [r["heldout"] for r in evaluations],
        [1.96 * r["heldout_se"] for r in evaluations],
        label="this run",
        **look(0),
    )
    if "baseline_heldout" in evaluations[0]:
        name = f"best baseline: {evaluations[0]['baseline']}"
        axes.axhline(evaluations[0]["baseline_heldout"], color=TEXT, ls="--", lw=1, label=name)
    axes.set(xlabel="training step", ylabel=ERROR, yscale="log", title="error over training (95 % intervals)")
    axes.legend(loc="upper right", frameon=False)


def draw_depths(axes, curves: Curves, student: tuple[int, dict, str]) -> None:
    """Errors of the baselines against serial depth, and the best step's.

    Args:
        axes: to draw on.
        curves: the baselines' held-out errors by depth and name.
        student: depth, record and label of the best step.
    """
    for at, name in enumerate(dict.fromkeys(n for baselines in curves.values() for n in baselines), 1):
        points = [(d, baselines[name][1]) for d, baselines in sorted(curves.items()) if name in baselines]
        means = [e.mean() for _, e in points]
        halves = [1.96 * standard_error(e) for _, e in points]
        axes.errorbar([d for d, _ in points], means, halves, lw=1.2, ms=4, label=name, **look(at))
    depth, best, label = student
    star = {"marker": "*", "ms": 14, "color": look(0)["color"], "ls": "none"}
    axes.errorbar([depth], [best["heldout"]], [1.96 * best["heldout_se"]], label=label, **star)
    axes.set(
        xticks=sorted(curves),
        xlabel="serial depth (network calls one after another)",
        yscale="log",
        title="error by serial depth: lower is better",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def draw_bars(axes, curves: Curves, student: tuple[int, dict, str]) -> None:
    """Errors at one depth as bars, the smallest on top."""
    ((depth, baselines),) = curves.items()
    _, best, label = student
    rows = [(e.mean().item(), standard_error(e), name) for name, (_, e) in baselines.items()]
    rows = sorted([*rows, (best["heldout"], best["heldout_se"], label)], reverse=True)
    colours = [look(0)["color"] if name == label else SOFT for _, _, name in rows]
    axes.barh(
        range(len(rows)),
        [e for e, _, _ in rows],
        xerr=[1.96 * se for _, se, _ in rows],
        color=colours,
        height=0.62,
    )
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[name for _, _, name in rows],
        xlabel=ERROR,
        title=f"error at serial depth {depth}: lower is better",
    )
    axes.grid(False, axis="y")
