"""Figures of matplotlib as SVG that stands in an HTML page and takes its colours, and as PNG."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

TEXT, SOFT, LINE, PAGE = "#1b1f26", "#5b6472", "#d6dae1", "#ffffff"
VARIABLES = {TEXT: "var(--text)", SOFT: "var(--soft)", LINE: "var(--line)", PAGE: "var(--page)"}
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": TEXT,
    "text.color": TEXT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "figure.facecolor": PAGE,
    "axes.facecolor": PAGE,
    "savefig.facecolor": PAGE,
    "svg.fonttype": "none",
}
# 3 to 1 or more on a white and on a dark page
COLOURS = (
    "#2f74d0",
    "#d9600a",
    "#2b9a58",
    "#a05cd6",
    "#d6488f",
    "#1893a3",
    "#a8763e",
    "#d64545",
    "#85870f",
    "#7d8798",
    "#6b74e0",
)
MARKERS = "os^DvPXph<>"


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its name, what it shows in words, and the same as SVG for a page and as PNG."""

    name: str
    alt: str
    svg: str
    png: bytes


def styled(draw: Callable[[], Any]) -> Any:
    """What a function draws in the style of the report."""
    from matplotlib import style

    settings: list[str | Path | dict[str, Any]] = ["default", STYLE]
    with style.context(settings):
        return draw()


def picture(name: str, alt: str, draw: Callable, size: tuple[float, float]) -> Picture:
    """Let draw(axes) fill a figure of some inches, and write it as SVG and PNG."""
    from matplotlib.figure import Figure

    def both() -> Picture:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return Picture(name, alt, svg_of(figure, name, alt), png_of(figure))

    return styled(both)


def png_of(figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=140, metadata={"Software": None})
    return content.getvalue()


def svg_of(figure, name: str, alt: str = "") -> str:
    """A figure as an <svg> element: no addresses, identifiers of its own, the colours of the page; without
    words for it, hidden from screen readers.
    """
    from matplotlib import rc_context

    content = BytesIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=True)
    text = content.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    words = f'role="img" aria-label="{escape(alt)}"' if alt else 'aria-hidden="true"'
    return text.replace("<svg", f"<svg {words}", 1)
