"""The figures of a report, each as PNG for a light and for a dark page."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import Tensor

from solvers import SolverTable, Tableau

DARK: dict[str, Any] = {
    "figure.facecolor": "#16191f",
    "axes.facecolor": "#16191f",
    "savefig.facecolor": "#16191f",
    "text.parse_math": False,  # a dollar sign in a name is one
}
LIGHT: dict[str, Any] = {
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    "savefig.facecolor": "#ffffff",
    "text.parse_math": False,
}
# distinct to the colour-blind (Tol 2021)
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
MARKERS = "os^Dv*PX"
DODGE = 5  # points between the series, so that runs of equal cost do not hide each other
TRAINED = {True: " (trained on it)", False: "", None: " (trained on it?)"}
AREA = 420  # points squared of a weight of 1


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its name, what it shows in words, and its PNG files."""

    name: str
    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Point:
    """A run in a plot of quality against cost; points of one series are joined."""

    series: str
    cost: int
    mean: float
    interval: list[float] | None
    trained_on: bool | None


def picture(name: str, alt: str, draw: Callable, size: tuple[float, float]) -> Picture:
    """Let draw(axes) fill a figure of some inches, once for a light and once for a dark page."""
    from matplotlib import style
    from matplotlib.figure import Figure

    files = []
    light: list[str | Path | dict[str, Any]] = ["default", LIGHT]
    dark: list[str | Path | dict[str, Any]] = ["default", "dark_background", DARK]
    for settings in (light, dark):
        with style.context(settings):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure.subplots())
            content = BytesIO()
            figure.savefig(content, format="png", dpi=140, metadata={"Software": None})
            files.append(content.getvalue())
    return Picture(name, alt, *files)


def quality(name: str, alt: str, points: Iterable[Point], metric: str, cost: str) -> Picture:
    """A metric's means with 95 % intervals against a cost; hollow where the solver was, or may have been,
    trained on the metric.
    """
    from matplotlib.transforms import ScaledTranslation

    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(point.series, []).append(point)

    def draw(axes) -> None:
        for at, (label, runs) in enumerate(series.items()):
            side = DODGE * (at - (len(series) - 1) / 2) / 72
            place = axes.transData + ScaledTranslation(side, 0, axes.figure.dpi_scale_trans)
            colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
            runs = sorted(runs, key=lambda p: p.cost)
            axes.plot([p.cost for p in runs], [p.mean for p in runs], color=colour, lw=1.2, transform=place)
            for i, p in enumerate(runs):
                low, high = p.interval or (p.mean, p.mean)
                # artists with a transform of their own do not count for the limits
                axes.update_datalim([(p.cost, low), (p.cost, high)])
                fill = colour if p.trained_on is False else "none"
                axes.plot([p.cost] * 2, [low, high], color=colour, lw=1.2, marker="_", ms=6, transform=place)
                named = label + TRAINED[p.trained_on] if i == 0 else None
                axes.plot(
                    [p.cost],
                    [p.mean],
                    color=colour,
                    marker=marker,
                    mfc=fill,
                    ls="none",
                    transform=place,
                    label=named,
                )
        axes.margins(0.08)
        axes.autoscale_view()
        axes.set(xlabel=cost, ylabel=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, alpha=0.3)
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)

    return picture(name, alt, draw, (4.6, 3.3 + 0.1 * len(series)))


def solver_table(name: str, alt: str, table: SolverTable) -> Picture:
    """Positions r of a table's points in each interval, weights w as the circles' areas."""

    def draw(axes) -> None:
        for n in range(table.num_intervals):
            axes.axhline(n, color="grey", lw=0.8, zorder=0)
            for k, (r, w) in enumerate(zip(table.r[n].tolist(), table.w[n].tolist(), strict=True)):
                circle(axes, r, n, w, COLOURS[k % len(COLOURS)])
                axes.annotate(
                    f"{w:.2f}", (r, n), (0, 11), textcoords="offset points", ha="center", fontsize=8
                )
        axes.set(
            xlim=(-0.06, 1.06),
            xlabel="position r in the interval; number and area: weight w",
            ylabel="interval",
        )
        rows(axes, table.num_intervals)

    return picture(name, alt, draw, (4.6, 1.2 + 0.55 * table.num_intervals))


def tableau(name: str, alt: str, table: Tableau) -> Picture:
    """Noise levels of a tableau's stages in each level, their weights in the result as the circles' areas,
    over the largest.
    """
    weights: Tensor = table.output[1:] / table.output[1:].abs().max().clamp(min=1e-12)

    def draw(axes) -> None:
        axes.set_xscale("log")
        axes.invert_xaxis()
        for n, level in enumerate(table.levels):
            axes.axhline(n, color="grey", lw=0.8, zorder=0)
            for k, s in enumerate(level):
                circle(axes, table.sigmas[s].item(), n, weights[s].item(), COLOURS[k % len(COLOURS)])
        axes.margins(x=0.08)
        axes.set(xlabel="noise level σ; area: weight in the result (hollow: negative)", ylabel="level")
        rows(axes, table.depth)

    return picture(name, alt, draw, (4.6, 1.2 + 0.45 * table.depth))


def circle(axes, x: float, y: float, weight: float, colour: str) -> None:
    """A circle of an area in proportion to a weight, hollow if that is negative, with a dot at its centre."""
    axes.scatter(
        [x], [y], s=AREA * abs(weight), color=colour if weight >= 0 else "none", edgecolors=colour, alpha=0.75
    )
    axes.scatter([x], [y], s=4, color="black" if weight >= 0 else colour)


def rows(axes, count: int) -> None:
    """Rows 0 to count - 1 from top to bottom."""
    axes.set(ylim=(count - 0.4, -0.6), yticks=range(count))
