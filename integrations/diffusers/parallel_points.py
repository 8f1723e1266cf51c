"""The points of a level of a learned table in one network call of an unmodified diffusers pipeline.

Forward hooks on the pipeline's networks turn each row of a batch into K neighbouring rows, one a point. So
a hook need know neither the number of images nor the branches of guidance: a pipeline's arithmetic works on
rows, and EPDScheduler.step takes the points apart. Latents stay [B, ...]; `num_inference_steps` is the serial
depth.
"""

import inspect
import weakref
from typing import Any

import torch
from diffusers.models.controlnets import (
    FluxMultiControlNetModel,
    MultiControlNetModel,
    MultiControlNetUnionModel,
    QwenImageMultiControlNetModel,
    SD3MultiControlNetModel,
)
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

NETWORKS = ("unet", "transformer", "transformer_2", "controlnet")
SEVERAL = (  # ControlNets in one part, whose networks are their `nets`
    FluxMultiControlNetModel,
    MultiControlNetModel,
    MultiControlNetUnionModel,
    QwenImageMultiControlNetModel,
    SD3MultiControlNetModel,
)
NO_ROWS = (
    "txt_ids",
    "img_ids",
    "image_rotary_emb",
    "freqs_cis",
)  # positions, whose length can equal the batch's
TIMES = {  # what pipelines make of a timestep t of n
    "t": lambda t, n: t,
    "t / n": lambda t, n: t / n,
    "1 - t / n": lambda t, n: 1 - t / n,
}
_hooks: "weakref.WeakKeyDictionary[nn.Module, _PointsHook]" = weakref.WeakKeyDictionary()


def enable_parallel_points(pipe: Any) -> None:
    """Evaluate the K points of a level in one call; `num_inference_steps` is then a table's serial depth.

    Networks that are replaced or compiled later must be enabled again.

    Args:
        pipe: a pipeline with an EPDScheduler; those that share its networks and scheduler follow.
    Raises:
        ValueError: another scheduler, no network of a known name, or a network with a step cache.
    """
    scheduler = pipe.scheduler
    if type(scheduler).__name__ != "EPDScheduler":
        name = type(scheduler).__name__
        raise ValueError(f"enable_parallel_points: the scheduler is {name}, expected an EPDScheduler")
    modules = _networks(pipe)
    if not any(name != "controlnet" for name, _ in modules):
        raise ValueError(f"enable_parallel_points: the pipeline has none of {', '.join(NETWORKS[:3])}")
    for _, module in modules:
        _refuse_step_cache(module)
    disable_parallel_points(pipe)
    for name, module in modules:
        _hooks[module] = _PointsHook(pipe, scheduler, module, name != "controlnet")
    scheduler.parallel, scheduler.num_inference_steps = True, None


def disable_parallel_points(pipe: Any) -> None:
    """Evaluate one point a call again, in a pipeline and in all that share its networks."""
    schedulers = [pipe.scheduler]
    for _, module in _networks(pipe):
        hook = _hooks.pop(module, None)
        if hook is not None:
            hook.handle.remove()
            schedulers.append(hook.scheduler)
    for scheduler in schedulers:
        if type(scheduler).__name__ == "EPDScheduler":
            scheduler.parallel, scheduler.num_inference_steps = False, None


def _networks(pipe: Any) -> list[tuple[str, nn.Module]]:
    """The networks of a pipeline by name, each once; the nets of a MultiControlNet one by one."""
    parts = [(name, pipe.components[name]) for name in NETWORKS if pipe.components.get(name) is not None]
    nets = [
        (name, net) for name, part in parts for net in (part.nets if isinstance(part, SEVERAL) else [part])
    ]
    return [
        (name, net) for i, (name, net) in enumerate(nets) if all(net is not other for _, other in nets[:i])
    ]


def _refuse_step_cache(module: nn.Module) -> None:
    for part in module.modules():
        registry = part.__dict__.get("_diffusers_hook")
        names = (
            [name for name, hook in registry.hooks.items() if hook._is_stateful]
            if registry is not None
            else []
        )
        if names:
            raise ValueError(
                f"enable_parallel_points: {type(module).__name__} has a step cache ({names[0]}), which would "
                "reuse one point's activations for another; call disable_cache() on it first"
            )


class _PointsHook:
    """Replaces the inputs of one network by those of the points that are due."""

    def __init__(self, pipe: Any, scheduler: Any, module: nn.Module, answers: bool):
        self.pipe, self.scheduler, self.answers = weakref.ref(pipe), scheduler, answers
        inner = unwrap_module(module)  # of a compiled network
        self.names = list(inspect.signature(type(inner).forward).parameters)[1:]
        self.config = inner.config
        self.convention: str | None = None
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        inputs = dict(zip(self.names, args, strict=False)) | kwargs
        run = self._run(module)
        sample, points = inputs[self.names[0]], len(run.stages)
        if not torch.is_tensor(sample) or "timestep" not in inputs:
            raise _refusal(f"{type(module).__name__} takes no tensor of latents and timesteps")
        rows = len(sample)
        wide = {
            name: value if name in NO_ROWS else _repeat(value, rows, points) for name, value in inputs.items()
        }
        wide[self.names[0]] = self._place(sample.repeat_interleave(points, 0), rows, run)
        wide["timestep"] = self._times(inputs["timestep"], run).to(sample.device).repeat(rows)
        if self.answers:
            self.scheduler.points_answered = points
        return (), wide

    def _run(self, module: nn.Module) -> Any:
        """The trajectory under way, of the pipeline that has this scheduler."""
        pipe, scheduler = self.pipe(), self.scheduler
        if pipe is not None and pipe.scheduler is not scheduler:
            raise _refusal("the pipeline's scheduler was replaced; call disable_parallel_points(pipe)")
        if scheduler.num_inference_steps is None or (
            scheduler._run is None and scheduler.step_index is not None
        ):
            raise _refusal("its network was called outside a run; call disable_parallel_points(pipe) before")
        run = scheduler.run()
        if run.state is None:
            _refuse_step_cache(module)
        return run

    def _place(self, x: Tensor, rows: int, run: Any) -> Tensor:
        """Rows [rows * K, ...] of the first stage's input moved to each point's, and scaled."""
        factors, offsets = run.factors, None if run.state is None else run.offsets().flatten(0, 1)
        if len(run.stages) == 1 and self.scheduler.flow:
            return x
        dim = 1 if x.ndim > 3 else x.ndim - 1  # tokens have their channels last
        width = self._width(x, dim) if offsets is None else offsets.shape[dim]
        state, beside = x.narrow(dim, 0, width).float(), x.narrow(dim, width, x.shape[dim] - width)
        if offsets is not None:
            if len(x) % len(offsets) or state.shape[1:] != offsets.shape[1:]:
                raise _refusal(
                    f"the network's input {list(x.shape)} has other rows or tokens than the latents' "
                    f"{list(offsets.shape)}"
                )
            state = state + offsets.repeat(len(x) // len(offsets), *[1] * (x.ndim - 1))
        scales = factors if factors is not None else [1.0] * len(run.stages)
        if not self.scheduler.flow:
            scales = [
                f * (1 + run.table.sigmas[s] ** 2) ** -0.5 for f, s in zip(scales, run.stages, strict=True)
            ]
        scale = torch.tensor(scales, device=x.device).repeat(rows).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([(state * scale).to(x.dtype), beside], dim)

    def _width(self, x: Tensor, dim: int) -> int:
        """Channels of the latents among the input's at the start, when only the network is known."""
        out = self.config.get("out_channels") or self.config["in_channels"]
        if dim == 1:
            return min(x.shape[1], self.config["in_channels"], out)
        if x.shape[dim] not in (out, 4 * out):
            raise _refusal(
                f"the network's tokens have {x.shape[dim]} channels and its output {out}: in a first level "
                "of several points, latents cannot be separated from what lies beside them"
            )
        return x.shape[dim]

    def _times(self, given: Any, run: Any) -> Tensor:
        """The timesteps [K] of the points, as the pipeline passes that of the first one."""
        given = torch.as_tensor(given)
        times, train = self.scheduler.times[list(run.stages)], self.scheduler.config.num_train_timesteps
        if given.ndim > 1:
            raise _refusal(
                f"the network's timesteps have shape {list(given.shape)}, expected one for each row"
            )
        if run.state is None or not given.is_cuda:  # later in a run, reading it would wait for the GPU
            first, due = given.reshape(-1)[0].item(), times[0].item()
            if self.convention is None:
                self.convention = min(TIMES, key=lambda name: abs(TIMES[name](due, train) - first))
            expected = TIMES[self.convention](due, train)
            if abs(expected - first) > 0.01 * max(1.0, abs(first)):
                raise _refusal(f"the network's timestep is {first:.6g}, expected {expected:.6g}")
        converted = TIMES[self.convention](times, train)
        return converted.to(given.dtype if given.is_floating_point() else torch.float32)


def _repeat(value: Any, rows: int, points: int) -> Any:
    """Each row of a tensor `points` times, also within dicts and lists; another length stays."""
    if torch.is_tensor(value):
        return value.repeat_interleave(points, 0) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {
            name: item if name in NO_ROWS else _repeat(item, rows, points) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_repeat(item, rows, points) for item in value)
    return value


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"enable_parallel_points: {reason}; without parallel points this pipeline runs one point a call"
    )
