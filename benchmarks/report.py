"""What all benchmarks share: paired statistics, a text table, a JSON file that says where it was measured."""

import json
import platform
from pathlib import Path

import torch
from torch import Tensor

from solvers.files import write_atomically


def mean_and_halfwidth(values: Tensor) -> tuple[float, float]:
    """Mean of independent values [n] and the half width of its 95 % interval (1.96 standard errors)."""
    values = values.double()
    return values.mean().item(), 1.96 * (values.std() / len(values) ** 0.5).item()


def text_table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, aligned: the first columns to the left, numbers to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i < text_columns else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def device_name(device: torch.device) -> str:
    """The model name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, settings: dict, rows: list[dict], device: torch.device) -> None:
    """Settings, rows and the machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"device": device_name(device), "torch": torch.__version__}
    write_atomically(
        path, (json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=1, allow_nan=False) + "\n").encode()
    )
