"""Figures of matplotlib as SVG that stands in an HTML page and takes its colours, and as PNG."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import BytesIO

from common.figures import LINE, PAGE, SOFT, TEXT, styled

VARIABLES = {TEXT: "var(--text)", SOFT: "var(--soft)", LINE: "var(--line)", PAGE: "var(--page)"}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its name, what it shows in words, and the same as SVG for a page and as PNG."""

    name: str
    alt: str
    svg: str
    png: bytes


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
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
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
