"""A learned table as a k-diffusion sampler. Self-contained: it needs torch and tqdm only."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

FORMAT = "epd-table/1"
KEYS = ("sigmas", "stages", "output", "levels", "nodes", "starts")
MAX_STAGES, MAX_BYTES = 1000, 16 * 2**20


@dataclass(frozen=True)
class LearnedTable:
    """An explicit Runge-Kutta tableau over the whole trajectory (EPD-Solver, arXiv 2512.22796).

    Stage s evaluates g_s = (x_s - D(x_s, sigmas[s])) / sigmas[s] at
    x_s = stages[s][0] x_0 + sum_j stages[s][1 + j] g_j; the output weights give the result in the same way.

    Args:
        sigmas: noise levels of the S stages.
        stages, output: weights [S][S + 1] and [S + 1] of the start and of the stages' gradients.
        levels: stages that do not depend on each other, level by level.
        nodes: noise levels between steps, from the start to the result.
        starts: for each node but the last, the stage at which a run may begin there, or -1.
    Raises:
        ValueError: parts that contradict each other, which names them.
    """

    sigmas: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    output: tuple[float, ...]
    levels: tuple[tuple[int, ...], ...]
    nodes: tuple[float, ...]
    starts: tuple[int, ...]

    def __post_init__(self):
        count = len(self.sigmas)
        for name, shape in (
            ("sigmas", (None,)),
            ("nodes", (None,)),
            ("output", (count + 1,)),
            ("stages", (count, count + 1)),
        ):
            sizes = " x ".join("n" if size is None else str(size) for size in shape)
            _expect(_has_shape(vars(self)[name], shape), name, vars(self)[name], f"{sizes} finite numbers")
        _expect(min(self.sigmas) > 0, "sigmas", min(self.sigmas), "noise levels above 0")
        _expect(
            len(self.nodes) > 1 and min(self.nodes[:-1]) > 0 <= self.nodes[-1],
            "nodes",
            self.nodes,
            "noise levels",
        )
        fits = len(self.starts) == len(self.nodes) - 1 and self.starts[0] == 0
        fits = fits and all(type(s) is int and -1 <= s < count for s in self.starts)
        _expect(fits, "starts", self.starts, "a stage, or -1, for each node but the last, from 0 on")
        flat = [s for level in self.levels for s in level]
        consecutive = all(self.levels) and all(type(s) is int for s in flat) and flat == list(range(count))
        _expect(consecutive, "levels", self.levels, f"lists that hold the stages 0 to {count - 1} in order")
        used = [
            j for level in self.levels for s in level for j in range(level[0], count) if self.stages[s][1 + j]
        ]
        _expect(not used, "levels", self.levels, "no stage that uses a velocity of its own or a later level")
        _expect(
            self.stages[0][0] > 0,
            "stages",
            self.stages[0][0],
            "a first stage that is a multiple of the start",
        )

    @classmethod
    def from_predictor(cls, path: str | Path) -> "LearnedTable":
        """The table of a predictor file, a run folder or a name under exps; needs the EPD-Solver project."""
        from integrations.tables import table_data

        return cls.from_data(table_data(path))

    @classmethod
    def from_data(cls, data: Any) -> "LearnedTable":
        """A table of the plain data that JSON holds; other keys or types: ValueError."""
        _expect(
            isinstance(data, dict) and data.get("format") == FORMAT,
            "format",
            data,
            f"a dict with format {FORMAT!r}",
        )
        names = sorted(set(data) - {"format", "made_for"})
        _expect(names == sorted(KEYS), "table", names, f"the keys {', '.join(KEYS)}")
        for key in KEYS:
            _expect(isinstance(data[key], list), key, data[key], "a list")
        return cls(**{key: tuple(tuple(v) if isinstance(v, list) else v for v in data[key]) for key in KEYS})

    @classmethod
    def from_json(cls, path: str | Path) -> "LearnedTable":
        """The table of a JSON file of `python -m solvers.predictor to-comfyui`; else ValueError."""
        path = Path(path)
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, more than any table has")
            return cls.from_data(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None

    def step_of(self, sigmas: Sequence[float]) -> int:
        """The step at which a run over these noise levels begins: they are its nodes, or the end of them."""
        given, own = [float(s) for s in sigmas], list(self.nodes)
        for ends in (own, [*own[:-1], 0.0], [*own, 0.0]):
            n = len(ends) - len(given)
            tail = ends[n:] if 0 <= n < len(self.starts) else []
            if tail and all(abs(a - b) <= 1e-4 * b + 1e-9 for a, b in zip(given, tail, strict=True)):
                _expect(
                    self.starts[n] >= 0,
                    "the first noise level",
                    given[0],
                    f"{own[0]:.6g}: all {len(own)} noise levels",
                )
                return n
        levels = ", ".join(f"{s:.6g}" for s in own)
        raise ValueError(
            f"learned table: sigmas are {_brief(given)}, expected its own noise levels: {levels}"
        )

    def unit_start(self) -> bool:
        """Whether the start enters all stages with weight 1, as in tables of steps."""
        return all(row[0] == 1 for row in self.stages)

    def rows_from(self, first: int, known: Collection[int]) -> list[list[float]]:
        """All rows less that of stage `first`, which stands in for gradients that are not known."""
        rows = torch.tensor([*self.stages, self.output], dtype=torch.float64)
        rows = rows - rows[first]
        missing = [j for j in range(1, 1 + first) if j not in known]
        rows[:, 1 + first] += rows[:, missing].sum(1)
        rows[:, missing] = 0
        return rows.tolist()

    def steps(self) -> dict[int, int]:
        """The step that each stage begins, for those that begin one."""
        firsts = [level[0] for level in self.levels]
        begins = firsts if len(firsts) == len(self.starts) else self.starts
        return {stage: n for n, stage in enumerate(begins) if stage >= 0}


@torch.no_grad()
def sample_epd(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    table: LearnedTable,
    points_per_call: int = 1,
) -> Tensor:
    """Sample with a learned table (EPD-Solver, arXiv 2512.22796) in k-diffusion's conventions.

    Args:
        model: a denoiser D(x, sigma [rows], **extra_args).
        x: noise times the first noise level, [B, ...].
        sigmas: the table's nodes, or the end of them from one at which it may begin; their last may be 0.
        extra_args, callback, disable: as of any sampler of k-diffusion; the callback is called once a step.
        table: the learned table.
        points_per_call: points of a level in a call, at most (0: all); row m * B + b is point m of image b.
    Returns:
        The result at the table's last noise level, [B, ...].
    Raises:
        ValueError: noise levels that are not the table's.
    """
    n = table.step_of(sigmas.tolist())
    rows, values, base = [[*row] for row in (*table.stages, table.output)], {0: x.float()}, None
    steps = {stage: step - n for stage, step in table.steps().items() if step >= n}
    levels = [level for level in table.levels if level[0] >= table.starts[n]]
    with tqdm(total=len(steps), disable=disable) as bar:
        for level in levels:
            if level[0] in table.starts and (
                level[0] or table.unit_start()
            ):  # a node: what follows is relative to it
                base = _combine(rows[level[0]], values, base) if len(values) > 1 else values[0]
                rows = table.rows_from(level[0], values)
            points = [_combine(rows[s], values, base) for s in level]
            noise = [table.sigmas[s] for s in level]
            denoised = _denoise(model, points, noise, x.dtype, points_per_call, extra_args or {})
            for s, sigma, point, d in zip(level, noise, points, denoised, strict=True):
                values[1 + s] = (point - d.float()) / sigma
            if level[0] not in steps:
                continue
            bar.update()
            if callback is not None:
                sigma = x.new_tensor(noise[0])
                known = {
                    "x": points[0].to(x.dtype),
                    "i": steps[level[0]],
                    "denoised": denoised[0].to(x.dtype),
                }
                callback(known | {"sigma": sigma, "sigma_hat": sigma})
    return _combine(rows[-1], values, base).to(x.dtype)


def _denoise(
    model, points: list[Tensor], noise: list[float], dtype: torch.dtype, per_call: int, extra_args: dict
):
    """The denoised points, in calls of at most `per_call` of them."""
    size, images, denoised = per_call or len(points), len(points[0]), []
    for i in range(0, len(points), size):
        part = torch.cat(points[i : i + size]).to(dtype)
        sigma = part.new_tensor(noise[i : i + size]).repeat_interleave(images)
        denoised += model(part, sigma, **extra_args).split(images)
    return denoised


def _combine(row: list[float], values: dict[int, Tensor], base: Tensor | None) -> Tensor:
    """The row's weights times the start and the gradients, or what comes since the last node, the base."""
    total = row[0] * values[0] if base is None else base
    for j, weight in enumerate(row):
        if weight and (j or base is not None):
            total = total + weight * values[j]
    return total


def _has_shape(value: Any, shape: tuple) -> bool:
    if not shape:
        return type(value) in (int, float) and abs(value) < 1e100  # false for NaN
    if not isinstance(value, tuple):
        return False
    fits = len(value) == shape[0] or (shape[0] is None and 0 < len(value) <= MAX_STAGES)
    return fits and all(_has_shape(item, shape[1:]) for item in value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _expect(fits: bool, name: str, value: Any, expected: str) -> None:
    if not fits:
        raise ValueError(
            f"learned table: {name} is {_brief(value)}, expected {expected}; export the table again"
        )
