"""The picture of an RDPO run: its rewards over training."""

from collections.abc import Sequence

from common.figures import SOFT, look, save, styled

from ..run_folder import RunFolder


def draw(run: RunFolder, best_step: int) -> None:
    """Write reward.png into the run's folder: rewards of the rollouts, and held-out gains with intervals."""
    records = run.records()
    if any("table" in record for record in records):
        styled(lambda: draw_reward(run, records, best_step))


def draw_reward(run: RunFolder, records: Sequence[dict], best_step: int) -> None:
    """Two panels, with the step that is exported as a dashed line."""
    from matplotlib.figure import Figure

    heldout = [record for record in records if "table" in record]
    names = [key.removeprefix("gain_") for key in heldout[0] if key.startswith("gain_")]
    names = [name for name in names if not name.endswith("_halfwidth")]
    figure = Figure(figsize=(4.6 * (1 + len(names)), 3.6), layout="constrained")
    rollouts, *gains = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    steps = [record for record in records if "reward" in record]
    rollouts.plot([r["step"] for r in steps], [r["reward"] for r in steps], lw=1.2, color=look(0)["color"])
    rollouts.set(title="reward of the rollouts", ylabel="mean reward of a step's images")
    for at, (axes, name) in enumerate(zip(gains, names, strict=True), 1):
        half = [record.get(f"gain_{name}_halfwidth", 0.0) for record in heldout]
        axes.errorbar([r["step"] for r in heldout], [r[f"gain_{name}"] for r in heldout], half, **look(at))
        axes.axhline(0, color=SOFT, lw=1)
        axes.set(title=f"held-out {name}", ylabel="gain over the start table (95 %)")
    for axes in (rollouts, *gains):
        axes.axvline(best_step, color=SOFT, lw=1, ls="--")
        axes.set(xlabel="training step (dashed: exported)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    save(figure, run.path / "reward.png")
