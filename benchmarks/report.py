"""What all benchmarks share: paired statistics, a JSON file that says where it was measured."""

import json
import os
import platform
from datetime import date
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from common.files import write_atomically
from evaluation.tables import text_table

__all__ = ["RESULTS", "device_name", "mean_and_halfwidth", "result_path", "text_table", "write_json"]
RESULTS = Path(__file__).parent / "results"


def result_path(name: str, kind: str, out: Path | None) -> Path:
    """Where a benchmark writes without --out: each kind of networks has a file of its own."""
    return out or RESULTS / f"{name}{kind}.json"


def mean_and_halfwidth(values: Tensor) -> tuple[float, float]:
    """Mean of independent values [n] and the half width of its 95 % interval (1.96 standard errors)."""
    values = values.double()
    return values.mean().item(), 1.96 * (values.std() / len(values) ** 0.5).item()


def device_name(device: torch.device) -> str:
    """The model name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, settings: dict, rows: list[dict], device: torch.device) -> None:
    """Settings, rows and the machine as JSON, with the environment's settings of the C library's
    allocator.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "device": device_name(device),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": str(date.today()),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }
    result = {"settings": settings, "machine": machine, "rows": rows}
    write_atomically(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
