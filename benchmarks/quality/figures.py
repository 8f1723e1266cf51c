"""Pictures of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from torch import Tensor

from common.figures import COLOURS, LINE, SOFT, look, save, styled

ERROR = "RMSE of latents to the teacher"


def draw(path: Path, pictures: Mapping[str, Tensor], rows: Sequence[dict], title: str) -> None:
    """Images of the same prompts and seeds, a row a solver, and the error against serial depth; bars where
    there is one depth.
    """
    errors = [row for row in rows if row["rmse"] > 0]

    def drawn() -> None:
        height = 0.02 * len({row["solver"] for row in errors}) + 3.6
        figure, axes = image_rows(pictures, (), height, title)
        draw_errors(axes, errors)
        save(figure, path)

    styled(drawn)


def draw_depth(
    path: Path, pictures: Mapping[str, Tensor], captions: Sequence[str], rows: Sequence[dict], title: str
) -> None:
    """Images of the same prompts and seeds under their prompts, a row a solver, and the errors as bars.

    Args:
        path: the PNG file.
        pictures: images [n, 3, H, W] by solver.
        captions: their n prompts.
        rows: `solver`, `depth`, `evaluations`, `rmse` and `rmse_halfwidth` of each bar.
        title: above all.
    """

    def drawn() -> None:
        figure, axes = image_rows(pictures, captions, 0.6 + 0.3 * len(rows), title)
        draw_bars(axes, rows)
        save(figure, path)

    styled(drawn)


def image_rows(pictures: Mapping[str, Tensor], captions: Sequence[str], below: float, title: str):
    """A figure with a row of images a solver, and the axes below them, of some inches in height."""
    from matplotlib.figure import Figure

    count = max(len(images) for images in pictures.values())
    figure = Figure(figsize=(10, 0.75 * len(pictures) + below + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    above, under = figure.subfigures(2, 1, height_ratios=[0.75 * len(pictures) + 0.6, below])
    grid = above.subplots(len(pictures), count, squeeze=False)
    for axes_row, (name, images) in zip(grid, pictures.items(), strict=True):
        for axes, image in zip(axes_row, images, strict=False):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
        axes_row[0].set_ylabel(fill(name, 24), rotation=0, ha="right", va="center", color="black")
    for axes, caption in zip(grid[0], captions, strict=False):
        axes.set_title(
            fill(caption, 11, break_long_words=False),
            fontsize=7,
            fontweight="normal",
            loc="center",
            color=SOFT,
        )
    return figure, under.subplots()


def draw_errors(axes, rows: Sequence[dict]) -> None:
    """Errors with intervals against serial depth, or as bars where that is one."""
    if len({row["depth"] for row in rows}) == 1:
        draw_bars(axes, rows)
        return
    for at, name in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        line = [row for row in rows if row["solver"] == name]
        depth, error, half = ([row[key] for row in line] for key in ("depth", "rmse", "rmse_halfwidth"))
        axes.errorbar(depth, error, half, ms=5, lw=1.3, label=name, **look(at))
    axes.set(
        yscale="log",
        xticks=sorted({row["depth"] for row in rows}),
        xlabel="serial depth (network calls one after another)",
        ylabel=ERROR,
        title="error, with 95 % intervals: lower is better",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def draw_bars(axes, rows: Sequence[dict]) -> None:
    """Errors as bars, the smallest on top; what was learned in another colour."""
    ordered = sorted(rows, key=lambda row: row["rmse"], reverse=True)
    names = [f"{row['solver']} · {row['evaluations']} NFE" for row in ordered]
    learned = [row.get("learned", row.get("schedule") == "learned") for row in ordered]
    axes.barh(
        range(len(ordered)),
        [row["rmse"] for row in ordered],
        xerr=[row["rmse_halfwidth"] for row in ordered],
        color=[COLOURS[0] if own else COLOURS[9] for own in learned],
        ecolor=SOFT,
        height=0.62,
    )
    axes.set(
        yticks=range(len(ordered)),
        yticklabels=names,
        xlabel=ERROR,
        title="error, with 95 % intervals: lower is better (blue: learned)",
    )
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=LINE)


def draw_tradeoff(path: Path, rows: Sequence[dict]) -> None:
    """Reward against the error to the teacher, a point a run."""
    from matplotlib.figure import Figure

    def drawn() -> None:
        figure = Figure(figsize=(8, 4.6))
        axes = figure.subplots()
        for at, row in enumerate(rows):
            bars = {"xerr": row["rmse_halfwidth"], "yerr": row["reward_halfwidth"]}
            axes.errorbar(row["rmse"], row["reward"], **bars, ms=6, lw=1, label=row["solver"], **look(at))
        axes.set(
            xlabel=f"{ERROR} (lower is closer)",
            ylabel="reward (higher is better)",
            title="reward against distance from the teacher, with 95 % intervals",
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        save(figure, path)

    styled(drawn)
