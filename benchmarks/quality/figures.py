"""Pictures of a comparison."""

from pathlib import Path

from torch import Tensor

from generation.generate import make_grid


def draw(path: Path, pictures: dict[str, Tensor], rows: list[dict], title: str) -> None:
    """Images of the same prompts and seeds, a row a solver, and the error against serial depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from cycler import cycler

    figure, axes = plt.subplots(
        len(pictures) + 1,
        1,
        figsize=(10, 0.62 * len(pictures) + 4.6),
        height_ratios=[1] * len(pictures) + [6],
    )
    figure.suptitle(title, fontsize=10)
    for axis, (name, images) in zip(axes[:-1], pictures.items(), strict=True):
        axis.imshow(make_grid(images, len(images)).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[-1].set_prop_cycle(
        cycler(linestyle=["-", "--", ":"]) * cycler(color=plt.get_cmap("tab10").colors[:5])
    )
    for name in dict.fromkeys(r["solver"] for r in rows if r["rmse"] > 0):
        line = [r for r in rows if r["solver"] == name]
        depth, error, half = ([r[k] for r in line] for k in ("depth", "rmse", "rmse_halfwidth"))
        axes[-1].errorbar(depth, error, half, marker="o", ms=3, label=name)
    axes[-1].set(
        yscale="log",
        xlabel="serial depth (parallel evaluations one after the other)",
        ylabel="RMSE to the teacher",
    )
    axes[-1].grid(True, which="both", alpha=0.3)
    axes[-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_tradeoff(path: Path, rows: list[dict]) -> None:
    """Reward against the error to the teacher, a point a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5))
    for row in rows:
        half = row["rmse_halfwidth"], row["reward_halfwidth"]
        axis.errorbar(
            row["rmse"],
            row["reward"],
            xerr=half[0],
            yerr=half[1],
            marker="o",
            ms=4,
            lw=0.8,
            label=row["solver"],
        )
    axis.set(xlabel="RMSE to the teacher", ylabel="reward")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
