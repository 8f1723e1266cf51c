"""The figures of the report: what is drawn where, that no text is cut off, that colours can be seen."""

import re
from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import figures
from evaluation.report import plots, svg
from evaluation.report.plots import Mark, Panel, Point
from solvers import SolverTable, compile_tableau, polynomial
from solvers.baselines import BASELINES

LONG = "a solver of one's own with a very long name, guidance 12.5"


def panel(*points: Point, teacher: Point | None = None) -> Panel:
    return Panel("p", "digit_and_colour", "NFE (evaluations an image)", list(points), teacher)


def point(label: str, at: int, cost: int, mean: float, trained_on: bool | None = False) -> Point:
    return Point(Mark(label, at, at == 0), cost, mean, [mean - 0.1, mean + 0.1], trained_on)


CURVES = panel(
    *(point(name, at, cost, at + cost / 10) for at, name in enumerate("abc") for cost in (4, 6, 10))
)
ROWS = panel(*(point(name, at, 4, at / 10) for at, name in enumerate(("a", "b", LONG))))


def drawn(draw, shown: Panel, size=(plots.WIDTH, plots.HEIGHT)) -> Figure:
    def make() -> Figure:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(), shown)
        FigureCanvasAgg(figure).draw()
        return figure

    return figures.styled(make)


def text_boxes(figure: Figure) -> list:
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    hidden = []  # labels of ticks beyond the limits, which are not drawn
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        hidden += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in shown if t not in hidden]


@pytest.mark.parametrize(
    ("draw", "shown", "size"),
    [
        (plots.draw_curves, CURVES, (plots.WIDTH, plots.HEIGHT)),
        (plots.draw_rows, ROWS, plots.rows_size(ROWS)),
    ],
    ids=["curves", "rows"],
)
def test_no_text_leaves_its_figure(draw, shown, size):
    figure = drawn(draw, shown, size)
    width, height = figure.bbox.width, figure.bbox.height
    boxes = text_boxes(figure)
    assert len(boxes) > 5
    outside = [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    assert outside == []


def test_the_legend_beside_the_page_is_whole(monkeypatch):
    drawn = []
    write = plots.png_of
    monkeypatch.setattr(plots, "png_of", lambda figure: drawn.append(figure) or write(figure))
    many = panel(*(point(f"{LONG[:24]} {at}", at, cost, at) for at in range(11) for cost in (4, 6)))
    plots.with_legend([many, many], "Digits")
    (figure,) = drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    box = figure.legends[0].get_window_extent(renderer)
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width
    below = min(axes.get_tightbbox(renderer).y0 for axes in figure.axes)
    assert box.y1 <= below


def test_points_are_where_they_belong_and_lines_join_one_series():
    (axes,) = drawn(plots.draw_curves, CURVES).axes
    joined = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in joined] == [[4, 6, 10]] * 3
    assert [list(line.get_ydata()) for line in joined] == [
        [at + c / 10 for c in (4, 6, 10)] for at in range(3)
    ]
    singles = {
        (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1
    }
    assert singles == {(p.cost, p.mean) for p in CURVES.points}


def test_runs_of_one_cost_are_not_joined():
    two = panel(point("a", 0, 4, 0.1), point("a", 0, 4, 0.2), point("b", 1, 4, 0.1), point("b", 1, 6, 0.2))
    (axes,) = drawn(plots.draw_curves, two).axes
    slanted = [line for line in axes.lines if len(set(line.get_xdata())) == 2]
    assert [list(line.get_xdata()) for line in slanted] == [[4, 6]]


def test_one_cost_is_drawn_as_rows_with_the_best_on_top():
    (axes,) = drawn(plots.draw_rows, ROWS, plots.rows_size(ROWS)).axes
    labels = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert labels == ["a", "b", LONG]
    assert axes.get_title(loc="left").split() == ["digit_and_colour", "at", "NFE", "4"]
    assert LONG.split()[-1] in plots.quality(ROWS).svg


def test_what_was_trained_on_is_hollow():
    trained = panel(point("a", 0, 4, 0.1, True), point("b", 1, 6, 0.2))
    (axes,) = drawn(plots.draw_curves, trained).axes
    faces = [line.get_markerfacecolor() for line in axes.lines if len(line.get_xdata()) == 1]
    assert faces == [figures.PAGE, figures.COLOURS[1]]


def test_the_teacher_is_a_dashed_line_and_no_point():
    teacher = point("teacher", 0, 128, 5.0)
    (axes,) = drawn(plots.draw_curves, panel(*CURVES.points, teacher=teacher)).axes
    (line,) = [line for line in axes.lines if line.is_dashed()]
    assert set(line.get_ydata()) == {5.0}
    assert max(axes.get_xticks()) == 10


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#16191f"], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(page):
    for colour in figures.COLOURS:
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_eleven_series_look_different():
    looks = {(mark.colour, mark.marker) for mark in (Mark("x", at, False) for at in range(33))}
    assert len({Mark("x", at, False).colour for at in range(11)}) == 11
    assert len(looks) >= 11


def test_a_figure_takes_the_colours_of_the_page():
    text = plots.quality(CURVES).svg
    assert text.startswith("<svg")
    assert 'aria-label="digit_and_colour against NFE' in text
    assert "var(--soft)" in text
    assert "var(--line)" in text
    assert not any(colour in text for colour in svg.VARIABLES)
    assert "xmlns" not in text
    assert all(identifier.startswith("p-") for identifier in re.findall(r'\bid="([^"]+)"', text))


def test_weights_are_areas_of_tables_and_tableaus(monkeypatch):
    uniform = SolverTable.uniform(2, 2)
    heavy = SolverTable(uniform.r, uniform.w * 0 + uniform.w.new_tensor([0.9, 0.1]))
    circles = []
    draw = plots.circle
    monkeypatch.setattr(plots, "circle", lambda axes, *a: circles.append((draw(axes, *a), axes)[1]))
    assert "0.90" in plots.solver_table("table", "words", heavy).svg
    areas = [c.get_sizes()[0] for c in circles[0].collections]
    assert [a / b for a, b in pairwise(areas[:2])] == pytest.approx([9])
    heun = compile_tableau(BASELINES["heun"], polynomial(4, 0.03, 15.0))
    assert plots.tableau("tableau", "words", heun).png
