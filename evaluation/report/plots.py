"""The figures of a report: quality against cost, and learned tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from torch import Tensor

from common.figures import COLOURS, LINE, MARKERS, PAGE, SOFT, TEXT, styled
from solvers import SolverTable, Tableau

from .svg import Picture, picture, png_of, svg_of

TRAINED = {True: " (trained on it)", False: "", None: " (trained on it?)"}
AREA = 420  # points squared of a weight of 1
WIDTH, HEIGHT = 3.7, 2.7  # inches of a panel
DODGE = 4  # points between series, so that runs of equal cost do not hide each other


@dataclass(frozen=True)
class Mark:
    """How a series is drawn, the same in all plots of a page."""

    label: str
    at: int
    learned: bool

    @property
    def colour(self) -> str:
        """Its colour; no two of the first eleven series have the same."""
        return COLOURS[self.at % len(COLOURS)]

    @property
    def marker(self) -> str:
        """Its marker; a star for what was learned."""
        return "*" if self.learned else MARKERS[self.at % len(MARKERS)]

    @property
    def size(self) -> float:
        """Of the marker, in points."""
        return 11 if self.learned else 6


@dataclass(frozen=True)
class Point:
    """A run in a plot of quality against cost; points of one mark are joined."""

    mark: Mark
    cost: int
    mean: float
    interval: list[float] | None
    trained_on: bool | None


@dataclass(frozen=True)
class Panel:
    """A metric against a cost, of the runs of one family."""

    name: str
    metric: str
    cost: str
    """In words, for the axis."""
    points: list[Point]
    teacher: Point | None

    @property
    def alt(self) -> str:
        """The panel in words."""
        values = "; ".join(f"{p.mark.label} {p.mean:.3g} at {p.cost}" for p in self.points)
        return f"{self.metric} against {self.cost}: {values}."

    @property
    def costs(self) -> list[int]:
        """The different costs."""
        return sorted({point.cost for point in self.points})


def quality(panel: Panel) -> Picture:
    """A metric's means with 95 % intervals against a cost; a row a solver where all cost the same."""
    if len(panel.costs) == 1:
        return picture(panel.name, panel.alt, lambda axes: draw_rows(axes, panel), rows_size(panel))
    return picture(panel.name, panel.alt, lambda axes: draw_curves(axes, panel), (WIDTH, HEIGHT))


def rows_size(panel: Panel) -> tuple[float, float]:
    """Inches of a panel of a row a solver, high enough for names of several lines."""
    lines = sum(wrapped(label).count("\n") + 1 for label in {point.mark.label for point in panel.points})
    return WIDTH, max(1.6, 1.0 + 0.27 * lines)


def wrapped(label: str) -> str:
    """A name in lines that leave half of a panel's width."""
    return fill(label, 22)


def draw_curves(axes, panel: Panel) -> None:
    """Means against the cost, joined within a series where each cost is there once."""
    from matplotlib.transforms import ScaledTranslation

    series: dict[Mark, list[Point]] = {}
    for point in sorted(panel.points, key=lambda p: p.cost):
        series.setdefault(point.mark, []).append(point)
    for at, (mark, points) in enumerate(series.items()):
        side = DODGE * (at - (len(series) - 1) / 2) / 72
        place = axes.transData + ScaledTranslation(side, 0, axes.figure.dpi_scale_trans)
        costs = [p.cost for p in points]
        if len(set(costs)) == len(costs) > 1:
            width = 1.8 if mark.learned else 1.1
            axes.plot(costs, [p.mean for p in points], color=mark.colour, lw=width, transform=place)
        for p in points:
            low, high = p.interval or (p.mean, p.mean)
            axes.update_datalim([(p.cost, low), (p.cost, high)])  # a transform of their own does not count
            axes.plot([p.cost] * 2, [low, high], color=mark.colour, lw=1.1, transform=place)
            axes.plot([p.cost], [p.mean], transform=place, **style_of(p))
    draw_teacher(axes, panel, axes.axhline)
    axes.margins(0.09)
    axes.autoscale_view()
    axes.set(xlabel=panel.cost, title=fill(f"{panel.metric} against {panel.cost.split(' (')[0]}", 32))
    if len(panel.costs) <= 8:
        axes.set_xticks(panel.costs)


def draw_rows(axes, panel: Panel) -> None:
    """Means of one cost, a row a solver, the best on top."""
    points = sorted(panel.points, key=lambda p: p.mean)
    labels = list(dict.fromkeys(p.mark.label for p in points))
    for p in points:
        row = labels.index(p.mark.label)
        low, high = p.interval or (p.mean, p.mean)
        axes.plot([low, high], [row] * 2, color=p.mark.colour, lw=1.6, solid_capstyle="butt")
        axes.plot([p.mean], [row], **style_of(p))
    draw_teacher(axes, panel, axes.axvline)
    axes.set(
        yticks=range(len(labels)),
        yticklabels=[wrapped(label) for label in labels],
        ylim=(-0.7, len(labels) - 0.3),
        title=wrapped(f"{panel.metric} at {panel.cost.split(' (')[0]} {panel.costs[0]}"),
    )
    axes.grid(False, axis="y")


def draw_teacher(axes, panel: Panel, line) -> None:
    """The teacher's mean as a dashed line."""
    if panel.teacher is not None:
        line(panel.teacher.mean, color=SOFT, lw=1, ls=(0, (4, 3)), zorder=1)


def style_of(point: Point) -> dict:
    """How a point is drawn: hollow where its solver was, or may have been, trained on the metric."""
    mark = point.mark
    return {
        "marker": mark.marker,
        "ms": mark.size,
        "ls": "none",
        "color": mark.colour,
        "mfc": mark.colour if point.trained_on is False else PAGE,
        "mec": mark.colour,
    }


def legend_svg(mark: Mark, name: str) -> str:
    """The mark of a legend's line, as an <svg> element."""
    from matplotlib.figure import Figure

    def draw() -> str:
        figure = Figure(figsize=(0.4, 0.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.plot([-1, 1], [0, 0], color=mark.colour, lw=1.8 if mark.learned else 1.1)
        axes.plot([0], [0], marker=mark.marker, ms=mark.size, color=mark.colour)
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        return svg_of(figure, name)

    return styled(draw)


def with_legend(panels: Sequence[Panel], title: str) -> bytes:
    """The panels of a family with a title and one legend, as the bytes of a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    def draw() -> bytes:
        marks = {p.mark: p for panel in panels for p in panel.points}
        columns = 2
        rows = -(-len(panels) // columns)
        height = HEIGHT * rows + 0.6 + 0.22 * -(-len(marks) // 3)
        figure = Figure(figsize=(WIDTH * columns, height), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            (draw_rows if len(panel.costs) == 1 else draw_curves)(axes, panel)
        handles = [
            Line2D([], [], color=mark.colour, marker=mark.marker, ms=mark.size, label=mark.label)
            for mark in marks
        ]
        if any(panel.teacher for panel in panels):
            handles.append(Line2D([], [], color=SOFT, lw=1, ls=(0, (4, 3)), label="teacher"))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", color=TEXT)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        return png_of(figure)

    return styled(draw)


def solver_table(name: str, alt: str, table: SolverTable) -> Picture:
    """Positions r of a table's points in each interval, weights w as the circles' areas."""

    def draw(axes) -> None:
        for n in range(table.num_intervals):
            for k, (r, w) in enumerate(zip(table.r[n].tolist(), table.w[n].tolist(), strict=True)):
                circle(axes, r, n, w, COLOURS[k % len(COLOURS)])
                axes.annotate(
                    f"{w:.2f}", (r, n), (0, 11), textcoords="offset points", ha="center", fontsize=8
                )
        axes.set(
            title="points of each interval",
            xlim=(-0.06, 1.06),
            xlabel="position r; number and area: weight w",
            ylabel="interval",
        )
        rows(axes, table.num_intervals)

    return picture(name, alt, draw, (WIDTH, 1.4 + 0.5 * table.num_intervals))


def tableau(name: str, alt: str, table: Tableau) -> Picture:
    """Noise levels of a tableau's stages in each level, their weights in the result as the circles' areas,
    over the largest.
    """
    weights: Tensor = table.output[1:] / table.output[1:].abs().max().clamp(min=1e-12)

    def draw(axes) -> None:
        axes.set_xscale("log")
        axes.invert_xaxis()
        for n, level in enumerate(table.levels):
            for k, s in enumerate(level):
                circle(axes, table.sigmas[s].item(), n, weights[s].item(), COLOURS[k % len(COLOURS)])
        axes.margins(x=0.08)
        axes.set(
            title="stages of each level",
            xlabel="noise level σ; area: weight (hollow: negative)",
            ylabel="level",
        )
        rows(axes, table.depth)

    return picture(name, alt, draw, (WIDTH, 1.4 + 0.4 * table.depth))


def circle(axes, x: float, y: float, weight: float, colour: str) -> None:
    """A circle of an area in proportion to a weight, hollow if that is negative, with a dot at its centre."""
    fill = colour if weight > 0 else "none"
    axes.scatter([x], [y], AREA * abs(weight), facecolors=fill, edgecolors=colour, alpha=0.75, zorder=2)
    axes.plot([x], [y], ".", color=SOFT, ms=3, zorder=3)


def rows(axes, count: int) -> None:
    """Rows from 0 at the top."""
    axes.grid(False, axis="x")
    axes.grid(True, axis="y", color=LINE)
    axes.set(ylim=(count - 0.4, -0.6), yticks=range(count))
