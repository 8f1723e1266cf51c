"""Pictures of a distillation run: its table over training, and its error among the baselines'."""

from torch import Tensor

from ..run_folder import RunFolder
from .baselines import Baseline, standard_error
from .trainer import DistillTrainer


def draw(
    run: RunFolder, trainer: DistillTrainer, curves: dict[int, dict[str, tuple[Baseline, Tensor]]]
) -> None:
    """Write table.png and error.png into the run's folder."""
    import matplotlib

    matplotlib.use("Agg")
    evaluations = [r for r in run.records() if "table" in r and "heldout_se" in r]
    if not evaluations:
        return
    draw_table(run, evaluations)
    draw_error(run, trainer, evaluations, curves)


def draw_table(run: RunFolder, evaluations: list[dict]) -> None:
    """Every array of the table against the step."""
    import matplotlib.pyplot as plt

    names = list(evaluations[0]["table"])
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False)
    steps = [r["step"] for r in evaluations]
    for axis, name in zip(axes[0], names, strict=True):
        rows = [flat(r["table"][name]) for r in evaluations]
        for i, line in enumerate(zip(*rows, strict=True)):
            axis.plot(steps, line, lw=1, color=plt.get_cmap("viridis")(i / max(1, len(rows[0]) - 1)))
        axis.set(title=name, xlabel="step", yscale="log" if name == "sigmas" else "linear")
        axis.grid(True, alpha=0.3)
    figure.suptitle("the table over training (dark to light: first to last interval)", fontsize=9)
    figure.tight_layout()
    figure.savefig(run.path / "table.png", dpi=100)
    plt.close(figure)


def flat(values) -> list[float]:
    """Nested lists as one."""
    return [v for part in values for v in flat(part)] if isinstance(values, list) else [values]


def draw_error(
    run: RunFolder,
    trainer: DistillTrainer,
    evaluations: list[dict],
    curves: dict[int, dict[str, tuple[Baseline, Tensor]]],
) -> None:
    """Held-out error against the step, and against serial depth among the baselines."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.errorbar(
        [r["step"] for r in evaluations],
        [r["heldout"] for r in evaluations],
        [1.96 * r["heldout_se"] for r in evaluations],
        label="student",
    )
    if "baseline_heldout" in evaluations[0]:
        left.axhline(
            evaluations[0]["baseline_heldout"],
            color="black",
            ls="--",
            lw=1,
            label=f"best baseline ({evaluations[0]['baseline']})",
        )
    left.set(xlabel="step", ylabel="held-out RMSE to the teacher", yscale="log")
    right.set_prop_cycle(
        cycler(linestyle=["-", "--", ":"]) * cycler(color=[plt.get_cmap("tab10")(i) for i in range(5)])
    )
    for name in dict.fromkeys(n for baselines in curves.values() for n in baselines):
        points = [(d, baselines[name][1]) for d, baselines in sorted(curves.items()) if name in baselines]
        right.errorbar(
            [d for d, _ in points],
            [e.mean() for _, e in points],
            [1.96 * standard_error(e) for _, e in points],
            marker="o",
            ms=3,
            label=name,
        )
    best = min(evaluations, key=lambda r: r["heldout"])
    cost = trainer.student.cost()
    right.errorbar(
        [cost.depth],
        [best["heldout"]],
        [1.96 * best["heldout_se"]],
        marker="*",
        ms=12,
        color="black",
        label=f"student (NFE {cost.evaluations})",
    )
    right.set(xlabel="serial depth", ylabel="held-out RMSE to the teacher", yscale="log")
    for axis in (left, right):
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(run.path / "error.png", dpi=100)
    plt.close(figure)
