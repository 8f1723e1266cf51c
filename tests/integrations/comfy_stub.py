"""The parts of ComfyUI that the node and its sampler meet, with the same contracts."""

import importlib.util
import math
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Noise:
    """Variance exploding: noise is scaled by sigma; a result is left as it is."""

    sigma_max = 14.6146

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * (math.sqrt(1 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class Flow(Noise):
    """Flow matching: (1 - sigma) x + sigma noise, undone at the last noise level."""

    sigma_max = 1.0

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


@dataclass
class Model:
    """The model below a guider: only its conventions for noise are asked."""

    model_sampling: Any


@dataclass
class Cond:
    """A condition tensor as ComfyUI keeps it: rows that are tiled to a batch."""

    cond: Tensor

    def rows(self, count: int) -> Tensor:
        times = -(-count // len(self.cond))
        return self.cond.repeat(times, *[1] * (self.cond.ndim - 1))[:count]


@dataclass
class Guider:
    """Guidance over a normal distribution whose mean is the condition; notes the rows of each call."""

    inner_model: Model
    conds: dict[str, list[dict]]
    cfg: float = 3.0
    calls: list[int] = field(default_factory=list)

    def __call__(self, x, sigma, model_options=None, seed=None):
        self.calls.append(len(x))
        parts = [self.part(name, x, sigma) for name in ("positive", "negative")]
        return parts[1] + self.cfg * (parts[0] - parts[1])

    def part(self, name, x, sigma):
        size = sigma.view(-1, *[1] * (x.ndim - 1))
        total = torch.zeros_like(x)
        for condition in self.conds[name]:
            first = sigma[0].item()  # one decision for all rows
            if first > condition.get("timestep_start", math.inf) or first < condition.get(
                "timestep_end", 0.0
            ):
                continue
            mean = condition["model_conds"]["c_crossattn"].rows(len(x)).view(len(x), -1, *[1] * (x.ndim - 2))
            total = total + mean + (x - mean) * 0.5 / (0.5 + size**2)
        return total


class Inpaint:
    """Between the sampler and the guider: keeps what a mask does not cover."""

    def __init__(self, inner_model, latent, noise):
        self.inner_model, self.latent, self.noise = inner_model, latent, noise

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options, seed)
        keep = 1 - denoise_mask
        size = sigma.view(-1, *[1] * (x.ndim - 1))
        scaled = self.inner_model.inner_model.model_sampling.noise_scaling(size, self.noise, self.latent)
        out = self.inner_model(x * denoise_mask + scaled * keep, sigma, model_options, seed)
        return out * denoise_mask + self.latent * keep


class KSAMPLER:
    """Runs a sampler function with k-diffusion's conventions between the two scalings of noise."""

    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None):
        extra_args["denoise_mask"] = denoise_mask
        model, conventions = Inpaint(model_wrap, latent_image, noise), model_wrap.inner_model.model_sampling
        most = (
            math.isclose(conventions.sigma_max, sigmas[0].item(), rel_tol=1e-05)
            or sigmas[0] > conventions.sigma_max
        )
        x = conventions.noise_scaling(sigmas[0], noise, latent_image, most)

        def step(known):
            callback(known["i"], known["denoised"], known["x"], len(sigmas) - 1)

        x = self.sampler_function(
            model,
            x,
            sigmas,
            extra_args=extra_args,
            callback=step if callback else None,
            disable=True,
            **self.extra_options,
        )
        return conventions.inverse_noise_scaling(sigmas[-1], x)


def _port(kind: str):
    """An input or output type: what a schema says of it is kept."""
    make = {"Input": lambda name, **options: (kind, name, options), "Output": lambda: (kind,)}
    return types.SimpleNamespace(**{k: staticmethod(v) for k, v in make.items()})


def modules(models_dir: Path) -> dict[str, types.ModuleType]:
    """comfy.samplers, folder_paths and comfy_api.latest of an installation."""
    made = {
        name: types.ModuleType(name)
        for name in ("comfy", "comfy.samplers", "folder_paths", "comfy_api", "comfy_api.latest")
    }
    made["comfy"].samplers = made["comfy.samplers"]
    made["comfy.samplers"].KSAMPLER = KSAMPLER
    paths = made["folder_paths"]
    paths.models_dir, paths.folder_names_and_paths = str(models_dir), {}

    def add(kind, folder):
        paths.folder_names_and_paths.setdefault(kind, ([], set()))[0].append(folder)

    def names(kind):
        folders, suffixes = paths.folder_names_and_paths[kind]
        return sorted(p.name for folder in folders for p in Path(folder).glob("*") if p.suffix in suffixes)

    def find(kind, name):
        for folder in paths.folder_names_and_paths[kind][0]:
            if (Path(folder) / name).is_file():
                return str(Path(folder) / name)
        raise FileNotFoundError(name)

    paths.add_model_folder_path, paths.get_filename_list, paths.get_full_path_or_raise = add, names, find
    io = types.SimpleNamespace(
        ComfyNode=object,
        Schema=lambda **options: types.SimpleNamespace(**options),
        NodeOutput=lambda *values: types.SimpleNamespace(result=values),
        **{kind: _port(kind) for kind in ("Combo", "Boolean", "Sampler", "Sigmas")},
    )
    made["comfy_api.latest"].io, made["comfy_api.latest"].ComfyExtension = io, object
    return made


def load_node(folder: Path, name: str = "epd_solver_node") -> types.ModuleType:
    """A custom node folder as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
