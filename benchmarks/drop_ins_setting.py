"""A backbone of digits in diffusers' own pipeline and on the project's own path, for benchmarks.drop_ins."""

from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import Tensor

from backends import load_backend
from integrations.diffusers import EPDScheduler
from solvers import Predictor, Spec, load_predictor, sample

ROOT = Path(__file__).parents[1]
PIPELINES = {"ldm": StableDiffusionPipeline, "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
LENGTH = {"ldm": {}, "sd3": {"max_sequence_length": 4}, "flux": {"max_sequence_length": 16}}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("red", "green", "blue")


def table_file(name: str) -> Path:
    """The distilled predictor of a name: of the grid of digits, such as epd-g7.5-d4, or of a family's
    folder.
    """
    family = {"epd-g4.5-d4": "digits-sd3", "epd-g3.5-d4": "digits-flux"}.get(name)
    return ROOT / "exps" / (f"digits/grid/{name}.pkl" if family is None else f"{family}/distilled.pkl")


class Setting:
    """A backbone of digits, diffusers' pipeline on its networks, and prompts with their noise."""

    def __init__(self, family: str, images: int, dtype: torch.dtype = torch.float32):
        spec = Spec(backend="digits", backend_config={} if family == "ldm" else {"family": family})
        self.family, self.backend = family, load_backend(spec, "cpu", dtype)
        colours = [INKS[i % 3] for i in range(images)]
        self.prompts = [f"a bold {c} handwritten {DIGITS[i % 10]}" for i, c in enumerate(colours)]
        seeds = [torch.Generator().manual_seed(seed) for seed in range(images)]
        self.noise = torch.stack([torch.randn(self.backend.latent_shape, generator=seed) for seed in seeds])
        self.config = self.backend.pipe.scheduler.config
        self.pipe = self.pipeline(PIPELINES[family])

    def pipeline(self, kind: type) -> DiffusionPipeline:
        """A pipeline of this class on the backbone's networks."""
        more = {"requires_safety_checker": False} if self.family == "ldm" else {}
        pipe = kind(**self.backend.pipe.components | more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def scheduler(self, name: str) -> tuple[Predictor, EPDScheduler]:
        """A shipped table, and the scheduler that holds it."""
        return load_predictor(table_file(name)), EPDScheduler.from_predictor(
            table_file(name), config=self.config
        )

    def guidance(self, predictor: Predictor) -> float:
        """The scale that a table was made for."""
        return predictor.spec.guidance_rate

    def velocity(self, predictor: Predictor):
        """The project's own velocity under the prompts."""
        return self.backend.velocity(self.backend.encode(self.prompts, self.guidance(predictor)))

    def own(self, predictor: Predictor) -> Tensor:
        """The final latents of the project's own solver."""
        nodes = predictor.sigmas
        with torch.inference_mode():
            return sample(predictor.solver(), self.velocity(predictor), self.noise * nodes[0].item(), nodes)

    def call(self, scheduler, steps: int, guidance: float, **options) -> Tensor:
        """The final latents of the pipeline, not packed."""
        _, height, width = self.backend.latent_shape
        factor, noise = self.backend.pipe.vae_scale_factor, self.noise
        if self.family == "flux":
            noise = FluxPipeline._pack_latents(noise, len(noise), *self.backend.latent_shape)
        self.pipe.scheduler = scheduler
        size = {"height": height * factor, "width": width * factor, "guidance_scale": guidance}
        given = {"num_inference_steps": steps, "latents": noise, "output_type": "latent"} | LENGTH[
            self.family
        ]
        out = self.pipe(self.prompts, **size | given | options)[0]
        return (
            FluxPipeline._unpack_latents(out, height * factor, width * factor, factor)
            if self.family == "flux"
            else out
        )


def stock_dpmpp(setting: Setting) -> DPMSolverMultistepScheduler:
    """DPM++ (2M) for a family's pipeline, with the shift of its own scheduler for flow matching."""
    if setting.family == "ldm":
        return DPMSolverMultistepScheduler.from_config(setting.config)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return DPMSolverMultistepScheduler.from_config(setting.config, **flow)
