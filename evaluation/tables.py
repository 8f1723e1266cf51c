"""Tables and numbers as text."""

from collections.abc import Iterable

from common.statistics import ENOUGH_PROMPTS, STUDENT

STUDENT_NOTE = (
    f"Intervals over fewer than {ENOUGH_PROMPTS} prompts are Student's t: mean ± t × standard error clustered"
    " by prompt, prompts - 1 degrees of freedom."
)


def text_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, aligned: the first columns to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i < text_columns else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + ("-" if i < text_columns else ":") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([line(header), rule, *map(line, rows)])


def number(value: float | None, signed: bool = False, digits: int = 4) -> str:
    """Some significant digits, with its sign if asked for; a dash for None."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}#.{digits}g}".removesuffix(".")


def interval_footnote(methods: Iterable[str | None]) -> str:
    """A line to print under a table whose intervals were made by some methods: what Student's t is where one
    of them is it.
    """
    return f"\n\n{STUDENT_NOTE}" if STUDENT in methods else ""


def with_interval(mean: float, interval: list[float] | None, signed: bool = False) -> str:
    """A mean and its interval, where it has one."""
    if interval is None:
        return number(mean, signed)
    low, high = (number(value, signed) for value in interval)
    return f"{number(mean, signed)} [{low}, {high}]"
