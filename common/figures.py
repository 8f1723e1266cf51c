"""The look of every figure: colours, markers, sizes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT, SOFT, LINE, PAGE = "#1b1f26", "#5b6472", "#d6dae1", "#ffffff"
STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is one
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


def styled(draw: Callable[[], Any]) -> Any:
    """What a function draws in this style."""
    from matplotlib import style

    settings: list[str | Path | dict[str, Any]] = ["default", STYLE]
    with style.context(settings):
        return draw()


def look(at: int) -> dict[str, str]:
    """Colour, marker and line style of series number `at`; no two of the first 33 are alike."""
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": ("-", "--", ":")[at // len(COLOURS) % 3],
    }


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file, with margins that cut nothing off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None})
