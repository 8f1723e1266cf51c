"""EPDScheduler: learned solver tables as one scheduler of diffusers. It needs torch and diffusers only."""

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils import logging
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
MAX_STAGES, MAX_TIMESTEPS = 1000, 100_000
logger = logging.get_logger("diffusers." + __name__)


class EPDScheduler(SchedulerMixin, ConfigMixin):
    """Explicit Runge-Kutta tableaus with learned coefficients (EPD-Solver, arXiv 2512.22796), a call a
    timestep.

    Stage s evaluates g_s = velocity(stages[s, 0] x_0 + sum_j stages[s, 1 + j] g_j, sigmas[s]), and the
    result is output[0] x_0 + sum_j output[1 + j] g_j. `num_inference_steps` is the number of network calls
    one after another: of stages, or of levels with enable_parallel_points. It chooses among the tables.

    Args:
        tables: by number of stages S: sigmas [S], stages [S, S + 1], output [S + 1], levels (stages that do
            not depend on each other), nodes (noise levels between steps) and starts (stages at which
            image-to-image may begin).
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise schedule of the
            model, as in diffusers' DDIMScheduler; a flow-matching model uses the first alone.
        prediction_type: epsilon, v_prediction, sample or flow_prediction.
        mu: the dynamic shift that the tables were made for (FLUX), against which the shift of an image size
            is compared.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: from which a pipeline computes that
            shift.
        use_flow_sigmas: true for flow matching, so that FluxPipeline passes no sigmas.
        made_for: by number of stages: base model, guidance, resolution and error; a scheduler cannot see
            them.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        tables: dict | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list | None = None,
        prediction_type: str = "epsilon",
        mu: float | None = None,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        use_flow_sigmas: bool = False,
        made_for: dict | None = None,
    ):
        _expect(
            prediction_type in PREDICTIONS,
            "prediction_type",
            prediction_type,
            f"one of {', '.join(PREDICTIONS)}",
        )
        _expect(made_for is None or isinstance(made_for, dict), "made_for", made_for, "a dict or null")
        _expect(mu is None or _is_number(mu), "mu", mu, "a number or null")
        train = num_train_timesteps
        _expect(
            type(train) is int and 2 <= train <= MAX_TIMESTEPS,
            "num_train_timesteps",
            train,
            "an int from 2 to 100000",
        )
        self.flow = prediction_type == "flow_prediction"
        self._tables = [
            _Table.read(name, value, self.flow) for name, value in _dict(tables or {}, "tables").items()
        ]
        if not self.flow:
            betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
            self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
            self._log_alpha = 0.5 * self.alphas_cumprod.double().log()
        self.parallel, self.points_answered = False, 0
        self.table = self._tables[0] if self._tables else None
        self.timesteps, self.num_inference_steps = torch.empty(0), None
        self._begin_index = self._step_index = self._run = None
        self.sigmas = (
            torch.ones(1) if self.table is None else torch.tensor([*self.table.sigmas, self.table.nodes[-1]])
        )

    @classmethod
    def from_predictor(cls, *paths: str, config: dict | None = None) -> "EPDScheduler":
        """A scheduler that holds the tables of predictor files; the numbers of steps must differ.

        Args:
            paths: predictor files (.pkl), run folders or names under exps.
            config: `pipe.scheduler.config` of the pipeline that will use it: predictors do not record its
                noise schedule.
        Returns:
            The scheduler; `num_inference_steps` is one of its tables' numbers of network calls.
        Raises:
            PredictorError, a ValueError: a file cannot be read, does not fit `config`, or two have equal
            numbers of calls.
        """
        from integrations.tables import scheduler_options

        return cls(**scheduler_options(paths, config))

    @property
    def init_noise_sigma(self) -> float:
        """By what a pipeline multiplies unit noise [B, ...] to get the input of the first stage."""
        return (
            1.0 if self.flow or self.table is None else self.table.nodes[0] * self.table.stages[0, 0].item()
        )

    @property
    def step_index(self) -> int | None:
        """The call that is due next."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The call at which the pipeline began, if it set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this call, as image-to-image with a strength below 1 does."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None) -> None:
        """Choose the table with this number of network calls one after another.

        Args:
            num_inference_steps: stages of a table, or its levels with enable_parallel_points.
            device: where `timesteps` will be.
            sigmas: only a pipeline's own uniform default, whose length is the number of steps.
            mu: the dynamic shift of the image size, which is compared with that of the table.
        Raises:
            ValueError: no table has this number, custom sigmas, or a run that a pipeline will cut
            (denoising_end).
        """
        if sigmas is not None:
            num_inference_steps = _length_of_default(sigmas)
        _refuse_denoising_end()
        self.table = self._choose(num_inference_steps)
        own = self.config.mu
        if mu is not None and own is not None and abs(mu - own) > 1e-3:
            logger.warning(f"EPDScheduler: learned for mu {own:.4f}, but this image size has {mu:.4f}")
        self.num_inference_steps, levels = num_inference_steps, self.table.levels
        self.calls = levels if self.parallel else tuple((s,) for level in levels for s in level)
        first = [call[0] for call in self.calls]
        self.times = self._time(torch.tensor(self.table.sigmas, dtype=torch.float64)).float()
        self.timesteps = self.times[first].to(device)
        self.sigmas = torch.tensor([*(self.table.sigmas[s] for s in first), self.table.nodes[-1]])
        self._step_index = self._begin_index = self._run = None
        self.points_answered = 0

    def _choose(self, steps: int | None) -> "_Table":
        held = [t.depth if self.parallel else len(t.sigmas) for t in self._tables]
        if held.count(steps) != 1:
            numbers = ", ".join(map(str, sorted(held))) or "none: make it with EPDScheduler.from_predictor"
            problem = "which several of its tables have:" if steps in held else "but its learned tables have"
            raise ValueError(f"EPDScheduler: num_inference_steps={steps}, {problem} {numbers} network calls")
        return self._tables[held.index(steps)]

    def _time(self, sigma: Tensor) -> Tensor:
        """The continuous timestep of noise levels: log alpha is piecewise linear in it; flow: 1000 sigma."""
        train = self.config.num_train_timesteps
        if self.flow:
            return train * sigma
        return _interpolate(
            -0.5 * torch.log1p(sigma**2), self._log_alpha.flip(0), torch.arange(train).double().flip(0)
        )

    def _sigma(self, time: Tensor) -> Tensor:
        train = self.config.num_train_timesteps
        if self.flow:
            return time / train
        return torch.expm1(-2 * _interpolate(time, torch.arange(train).double(), self._log_alpha)).sqrt()

    def run(self, timestep: Any = None) -> "_Run":
        """The trajectory under way; begun at the pipeline's begin index, or at the call of this timestep."""
        if self._run is None:
            if self.num_inference_steps is None or self._step_index is not None:
                raise ValueError("EPDScheduler: the last step is over; call set_timesteps before another")
            index = self._begin_index
            if index is None:
                index = (
                    0 if timestep is None else int((self.timesteps.cpu() - float(timestep)).abs().argmin())
                )
            self._run = _Run(self.table, self.calls, index, self.config.prediction_type)
            self._step_index = index
        return self._run

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: x / sqrt(1 + sigma^2); x itself for flow matching and parallel points."""
        stage = self.run(timestep).stages[0]
        if self.flow or self.parallel:
            return sample
        return sample * (1 + self.table.sigmas[stage] ** 2) ** -0.5

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator=None, return_dict: bool = True
    ):
        """Take in the network's output at the stages that are due, and give the next input (or the result).

        Args:
            model_output: [B, ...], or [B * K, ...] for K parallel points (row b * K + k is point k of image
                b).
            timestep: the timestep of the call.
            sample: latents [B, ...] of the pipeline; what a mask or a callback changed in them is added to
                all that follows.
            generator: not used; the solver is deterministic.
            return_dict: a SchedulerOutput, or a tuple of one tensor.
        Raises:
            ValueError: another number of points than is due, or no step is due.
        """
        run = self.run(timestep)
        stages, rows = run.stages, len(model_output)
        if rows != len(stages) * len(sample) or (self.parallel and self.points_answered != len(stages)):
            raise ValueError(
                f"EPDScheduler: {len(stages)} points of {len(sample)} images were due, but the network gave "
                f"{rows} rows for {self.points_answered or 1} points; after changing a pipeline's networks, "
                "call enable_parallel_points(pipe) again"
            )
        x = run.advance(sample, model_output.float().unflatten(0, (len(sample), len(stages))).unbind(1))
        self.points_answered, self._step_index = 0, run.index
        if run.finished:
            self._run = None
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 + sigma noise, or (1 - sigma) x_0 + sigma noise for flow matching, at timesteps [] or [B]."""
        sigma = (
            self._sigma(torch.as_tensor(timesteps).reshape(-1).cpu().double())
            .float()
            .to(original_samples.device)
        )
        sigma = sigma.view(-1, *[1] * (original_samples.ndim - 1))
        kept = 1 - sigma if self.flow else 1.0
        return (kept * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """add_noise under the name and in the order that flow-matching pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class _Run:
    """One trajectory: the velocities so far and the call that is due.

    It begins at call `begin`. Where that is no start of the table, Euler steps lead to the next one, or to
    the end.
    """

    def __init__(self, table: "_Table", calls: tuple, begin: int, prediction: str):
        self.table, self.calls, self.index, self.prediction = table, calls, begin, prediction
        starts = [i for i in range(begin, len(calls)) if calls[i][0] in table.starts]
        self.join = starts[0] if starts else len(calls)
        if self.join > begin:
            euler = self.join - begin
            logger.warning(
                f"EPDScheduler: begun between the nodes of its table, so {euler} Euler steps come first"
            )
        self.rows = torch.cat([table.stages, table.output[None]]).tolist()
        self.values: dict[int, Tensor] = {}
        self.base = self.state = self.shift = self.returned = None
        self.version = 0

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of the call that is due."""
        return self.calls[self.index] if self.index >= self.join else self.calls[self.index][:1]

    @property
    def finished(self) -> bool:
        """Whether no call is due."""
        return self.index == len(self.calls)

    @property
    def factors(self) -> list[float] | None:
        """At the very start, the stages' inputs as multiples of the first one's; later None."""
        if self.state is not None:
            return None
        return [self.rows[s][0] / self.rows[0][0] for s in self.stages] if self.index == 0 else [1.0]

    def offsets(self) -> Tensor:
        """The stages' inputs less the first one's, which the pipeline holds: [B, K, ...]."""
        first, *others = self.stages
        start = self._combine(self.rows[first]) if others else self.state
        return torch.stack([start - start, *(self._combine(self.rows[s]) - start for s in others)], 1)

    def advance(self, sample: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
        """From the network's outputs at the stages to the input of the next first stage, or the result."""
        self._accept(sample)
        euler, stages = self.index < self.join, self.stages
        for s, output in zip(stages, outputs, strict=True):
            self.values[1 + s] = self._velocity(output, s)
        self.index += 1
        if euler:
            x = self.state + (self._level() - self.table.sigmas[stages[0]]) * self.values[1 + stages[0]]
        else:
            x = self._combine(self.rows[-1 if self.finished else self.calls[self.index][0]])
        self.state, self.returned = x, x.to(sample.dtype, copy=True)
        self.version = None if self.returned.is_inference() else self.returned._version
        return self.returned

    def _accept(self, sample: Tensor) -> None:
        """The pipeline's latents: the start, or what it was given, maybe changed by a mask or a callback."""
        if self.state is None:
            self.state = sample.float()
            self.values[0] = self.state / self.rows[0][0]
        elif sample is not self.returned or sample.is_inference() or sample._version != self.version:
            moved = sample.float() - self.state.to(sample.dtype).float()
            self.shift = moved if self.shift is None else self.shift + moved
            self.state = self.state + moved
        first = self.stages[0]
        if self.index >= self.join and first in self.table.starts and (first or self.table.unit_start):
            self.values = self.values if self.index > self.join else {0: self.values[0]}
            self.base, self.shift = self.state, None  # a node: all that follows is relative to it
            self.rows = self.table.rows_from(first, self.values)

    def _velocity(self, output: Tensor, stage: int) -> Tensor:
        """dx/dsigma of the network's output at a stage."""
        if self.prediction in ("epsilon", "flow_prediction"):
            return output
        x = self.state if stage == self.stages[0] else self._combine(self.rows[stage])
        sigma = self.table.sigmas[stage]
        if self.prediction == "sample":
            return (x - output) / sigma
        scale = (1 + sigma**2) ** -0.5
        return scale * (output + sigma * scale * x)

    def _level(self) -> float:
        """The noise level of the call that is due, or of the result."""
        return self.table.nodes[-1] if self.finished else self.table.sigmas[self.stages[0]]

    def _combine(self, row: list[float]) -> Tensor:
        """The row's weights times x_0 and the velocities, or what comes since the last node.

        Both sums are rounded as the project's own solvers round them: a step's, and a whole tableau's.
        """
        if self.base is not None:
            total = self.base
            for j, weight in enumerate(row):
                total = total + weight * self.values[j] if weight else total
        else:
            total = row[0] * self.values[0]
            for j, weight in enumerate(row[1:], 1):
                total = torch.add(total, self.values[j], alpha=weight) if weight else total
        return total if self.shift is None else total + self.shift


@dataclass(frozen=True)
class _Table:
    """A tableau of the config, with the same checks as a Tableau of the project."""

    sigmas: tuple[float, ...]
    stages: Tensor
    output: Tensor
    levels: tuple[tuple[int, ...], ...]
    nodes: tuple[float, ...]
    starts: tuple[int, ...]

    @property
    def depth(self) -> int:
        """The serial depth: calls one after another with all points of a level in one."""
        return len(self.levels)

    @property
    def unit_start(self) -> bool:
        """Whether x_0 enters all stages with weight 1, as in tables of steps."""
        return bool((self.stages[:, 0] == 1).all())

    @classmethod
    def read(cls, name: Any, value: Any, flow: bool) -> "_Table":
        """A table of the config; what it lacks or contradicts: ValueError that names it."""
        at = f"tables[{name!r}]"
        names = ("sigmas", "stages", "output", "levels", "nodes", "starts")
        _expect(
            set(_dict(value, at)) == set(names), at, sorted(map(str, value)), f"the keys {', '.join(names)}"
        )
        sigmas = _numbers(value["sigmas"], f"{at}.sigmas", (None,))
        count = len(sigmas)
        _expect(str(name) == str(count), at, name, f"its number of stages, {count}")
        stages = _numbers(value["stages"], f"{at}.stages", (count, count + 1))
        output, nodes = (
            _numbers(value["output"], f"{at}.output", (count + 1,)),
            _numbers(value["nodes"], f"{at}.nodes", (None,)),
        )
        levels, starts = value["levels"], value["starts"]
        _check_levels(levels, stages, f"{at}.levels")
        _expect(bool((sigmas > 0).all()), f"{at}.sigmas", sigmas.min().item(), "noise levels above 0")
        _expect(
            len(nodes) > 1 and bool((nodes[:-1] > 0).all() and nodes[-1] >= 0),
            f"{at}.nodes",
            nodes.tolist(),
            "noise levels",
        )
        fits = isinstance(starts, list) and len(starts) == len(nodes) - 1 and starts[0] == 0
        fits = fits and all(type(s) is int and -1 <= s < count for s in starts)
        _expect(fits, f"{at}.starts", starts, "a stage, or -1, for each node but the last, from 0 on")
        _expect(
            stages[0, 0].item() > 0,
            f"{at}.stages",
            stages[0, 0].item(),
            "a first stage that is a multiple of the start",
        )
        exact = not flow or nodes[0] * stages[0, 0] == 1
        _expect(
            exact,
            f"{at}.nodes",
            nodes[0].item(),
            "a start at noise level 1, as flow-matching pipelines begin there",
        )
        return cls(
            tuple(sigmas.tolist()),
            stages,
            output,
            tuple(map(tuple, levels)),
            tuple(nodes.tolist()),
            tuple(starts),
        )

    def rows_from(self, first: int, known: Collection[int]) -> list[list[float]]:
        """All rows less that of stage `first`, which stands in for velocities that are not known."""
        rows = torch.cat([self.stages, self.output[None]]) - self.stages[first]
        missing = [j for j in range(1, 1 + first) if j not in known]
        rows[:, 1 + first] += rows[:, missing].sum(1)
        rows[:, missing] = 0
        return rows.tolist()


def _check_levels(levels: Any, stages: Tensor, at: str) -> None:
    """Runs of consecutive stages, of which none uses a velocity of its own or a later level."""
    lists = isinstance(levels, list) and all(isinstance(level, list) and level for level in levels)
    flat = [s for level in levels for s in level] if lists else []
    consecutive = all(type(s) is int for s in flat) and flat == list(range(len(stages)))
    _expect(lists and consecutive, at, levels, f"lists that hold the stages 0 to {len(stages) - 1} in order")
    for level in levels:
        later = stages[level, 1 + level[0] :]
        _expect(
            not bool(later.any()), at, levels, "no stage that uses a velocity of its own or a later level"
        )


def _betas(train: int, start: Any, end: Any, schedule: Any, trained: Any) -> Tensor:
    """The variances of the noise schedule [train], as diffusers' schedulers compute them."""
    if trained is not None:
        betas = _numbers(trained, "trained_betas", (train,)).float()
    elif schedule == "squaredcos_cap_v2":
        bars = [math.cos((i / train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bars)])
    else:
        _expect(
            schedule in ("linear", "scaled_linear"),
            "beta_schedule",
            schedule,
            "linear, scaled_linear or squaredcos_cap_v2",
        )
        ends = _numbers([start, end], "beta_start, beta_end", (2,)).tolist()
        _expect(0 < ends[0] < 1 and 0 < ends[1] < 1, "beta_start, beta_end", ends, "numbers between 0 and 1")
        if schedule == "linear":
            betas = torch.linspace(*ends, train, dtype=torch.float32)
        else:
            betas = torch.linspace(*(b**0.5 for b in ends), train, dtype=torch.float32) ** 2
    _expect(
        bool(((betas > 0) & (betas < 1)).all()),
        "betas",
        [betas.min().item(), betas.max().item()],
        "numbers between 0 and 1",
    )
    return betas


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), knots ascending; linear beyond the ends."""
    i = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    slope = (values[i] - values[i - 1]) / (knots[i] - knots[i - 1])
    return values[i - 1] + slope * (x - knots[i - 1])


def _length_of_default(sigmas: Any) -> int:
    """The length of sigmas that are a pipeline's own uniform default; custom ones: ValueError."""
    given = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    count = len(given)
    defaults = [torch.linspace(1, 1 / max(count, 1), count), torch.linspace(1, 0, count + 1)[:-1]]
    if not any(torch.allclose(given, default.double(), atol=1e-5) for default in defaults):
        raise ValueError(
            "EPDScheduler: its noise levels are learned, so sigmas cannot be given; pass num_inference_steps"
        )
    return count


def _refuse_denoising_end() -> None:
    """SDXL's denoising_end may cut inside a step, which a scheduler cannot see: ValueError."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return
        pipe, end = frame.f_locals.get("self"), frame.f_locals.get("denoising_end")
        if isinstance(pipe, DiffusionPipeline) and isinstance(end, float) and 0 < end < 1:
            raise ValueError(
                "EPDScheduler: denoising_end can cut inside a step of a learned table; leave it out"
            )
        frame = frame.f_back


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # false for NaN


def _dict(value: Any, at: str) -> dict:
    _expect(isinstance(value, dict), at, value, "a dict")
    return value


def _has_shape(value: Any, shape: tuple) -> bool:
    if not shape:
        return _is_number(value)
    if not isinstance(value, list) or not (
        len(value) == shape[0] or (shape[0] is None and 0 < len(value) <= MAX_STAGES)
    ):
        return False
    return all(_has_shape(item, shape[1:]) for item in value)


def _numbers(value: Any, at: str, shape: tuple) -> Tensor:
    """A float64 tensor of nested lists of finite numbers; None in `shape` is any length up to 1000."""
    sizes = " x ".join("n" if size is None else str(size) for size in shape)
    _expect(_has_shape(value, shape), at, value, f"{sizes} finite numbers in lists")
    return torch.tensor(value, dtype=torch.float64)


def _expect(fits: bool, at: str, value: Any, expected: str) -> None:
    if not fits:
        text = repr(value)
        text = text if len(text) <= 200 else text[:200] + "..."
        raise ValueError(f"EPDScheduler: {at} is {text}, expected {expected}; export the table again")
