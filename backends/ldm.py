"""Stable Diffusion 1.x and 2.x: any diffusers folder, hub id or single checkpoint file."""

import os
from pathlib import Path

import torch
from torch import Tensor

from solvers import NoiseSchedule

from . import quiet  # noqa: F401  isort: skip
from diffusers import StableDiffusionPipeline  # isort: skip
from huggingface_hub.errors import LocalEntryNotFoundError  # isort: skip
from .base import Backend, BackendError, Condition, guide, per_points

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SINGLE_FILES = (".safetensors", ".ckpt")
OPTIONS = {  # name: type and meaning
    "model_name_or_path": (str, "folder, hub id or .safetensors/.ckpt file"),
    "config": (str, "folder or hub id with the configuration of a single file"),
    "revision": (str, "revision of a hub id"),
    "variant": (str, "file variant such as fp16"),
    "resolution": (int, "pixels a side, a multiple of the VAE factor"),
    "negative_prompt": (str, "what guidance moves away from"),
    "enable_model_cpu_offload": (bool, "keep only the running model on the device"),
    "torch_dtype": (str, "auto, float32, float16 or bfloat16"),
}
IMAGE_OPTIONS = ("config", "variant", "resolution", "negative_prompt")


class LDM(Backend):
    """An eps- or v-prediction latent diffusion U-Net in the variance-exploding convention x = x0 + sigma eps.

    The network sees x / sqrt(1 + sigma^2) at the continuous time T t(sigma) - 1 in float32; its eps is the velocity.
    """

    def __init__(self, pipe: StableDiffusionPipeline, device: torch.device, config: dict, name: str = "ldm"):
        self.name, self.device, self.config = name, torch.device(device), config
        self.pipe, self.dtype = pipe, pipe.unet.dtype
        self.prediction = pipe.scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise BackendError(f"prediction_type {self.prediction!r} of the scheduler: expected epsilon or v_prediction")
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        if config.get("enable_model_cpu_offload"):
            if self.device.type == "cpu":
                raise BackendError("enable_model_cpu_offload needs an accelerator, but the device is cpu")
            pipe.enable_model_cpu_offload(device=self.device)
        else:
            pipe.to(self.device)
        self.noise_schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod)
        self._schedule = self.noise_schedule if self.device.type == "mps" else self.noise_schedule.to(self.device)
        self.sigma_min, self.sigma_max = self.noise_schedule.sigma_min, self.noise_schedule.sigma_max
        self.latent_shape = (pipe.unet.config.in_channels, *[self._latent_size()] * 2)
        self._embeddings: dict[str, Tensor] = {}

    def _latent_size(self) -> int:
        factor, pixels = self.pipe.vae_scale_factor, self.config.get("resolution")
        if pixels is None:
            return self.pipe.unet.config.sample_size
        if not isinstance(pixels, int) or pixels <= 0 or pixels % factor:
            raise BackendError(f"resolution {pixels!r}: expected a positive multiple of {factor}")
        return pixels // factor

    def identity(self) -> str:
        if self.name == "digits":
            return "embedded"
        return self.config["model_name_or_path"] + (f"@{self.config['revision']}" if self.config.get("revision") else "")

    def networks(self):
        return {"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}

    def checkpoint_blocks(self):
        self.pipe.unet.enable_gradient_checkpointing()

    def image_options(self):
        return {k: self.config[k] for k in IMAGE_OPTIONS if k in self.config}

    def encode(self, prompts, guidance_scale):
        negative = None
        if guidance_scale != 1:
            negative = {"text": self._embed(self.config.get("negative_prompt", ""))}
        return Condition({"text": torch.cat([self._embed(p) for p in prompts])}, negative, guidance_scale)

    def _embed(self, prompt: str) -> Tensor:
        """The text embedding [1, L, D] of a prompt, each by itself so that it does not depend on its batch; kept."""
        if prompt not in self._embeddings:
            with torch.inference_mode(False), torch.no_grad():  # kept for callers that differentiate as well
                embedding, _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
            if len(self._embeddings) >= 1024:
                self._embeddings.pop(next(iter(self._embeddings)))
            self._embeddings[prompt] = embedding
        return self._embeddings[prompt]

    def velocity(self, condition):
        batches: dict[int, dict[str, Tensor]] = {}

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            text = per_points(condition, len(x), batches)["text"]
            sigma = sigma.expand(len(x))
            scale = (1 + sigma**2).rsqrt().to(x.dtype).view(-1, 1, 1, 1)
            times = self._schedule.times
            t = (len(times) * self._schedule.t(sigma.to(times.device)) - 1).float().to(x.device)
            inputs = (x * scale).to(self.dtype)
            if condition.negative is not None:
                inputs, t = torch.cat([inputs, inputs]), torch.cat([t, t])
            eps = guide(self.pipe.unet(inputs, t, encoder_hidden_states=text).sample, condition)
            if self.prediction == "v_prediction":
                eps = scale * (eps + sigma.to(x.dtype).view(-1, 1, 1, 1) * scale * x)
            return eps

        return velocity

    def decode(self, latents, chunk: int = 8):
        vae = self.pipe.vae
        images = [vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample.float() for part in latents.split(chunk)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def load(config: dict, device: torch.device, dtype: torch.dtype, name: str = "ldm") -> LDM:
    """Load a Stable Diffusion 1.x or 2.x pipeline; missing or gated weights: BackendError with the remedy."""
    check_options(config)
    config = {"model_name_or_path": DEFAULT_MODEL} | config
    model = config["model_name_or_path"]
    looks_local = model.endswith(SINGLE_FILES) or model.startswith((".", "/", "~")) or os.sep * 2 in model or model.count("/") > 1
    path = Path(model).expanduser()
    if looks_local and not path.exists():
        raise BackendError(f"model {model!r} not found: expected a diffusers folder, a hub id, or a .safetensors/.ckpt file")
    options = {k: config[k] for k in ("revision", "variant") if config.get(k)}
    common = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False, "feature_extractor": None} | options
    try:
        if path.is_file():
            single = {"config": config["config"]} if config.get("config") else {}
            pipe = StableDiffusionPipeline.from_single_file(str(path), **single, **common)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(str(path) if path.is_dir() else model, **common)
    except Exception as error:  # what the libraries raise for a broken file has no common type
        raise BackendError(missing_weights(model, path, error)) from error
    check_parts(pipe, model)
    return LDM(pipe, device, config, name)


def check_options(config: dict) -> None:
    """Refuse an option that does not exist or has a value of another type."""
    for name, value in config.items():
        if name not in OPTIONS:
            raise BackendError(f"backend_config.{name}: unknown option, expected one of {', '.join(OPTIONS)}")
        kind, meaning = OPTIONS[name]
        if type(value) is not kind:
            raise BackendError(f"backend_config.{name} is {value!r}, expected {kind.__name__}: {meaning}")


def check_parts(pipe: StableDiffusionPipeline, model: str) -> None:
    """Refuse parts that load but do not belong together: inpainting and SDXL networks, a tokenizer without its files."""
    unet, words = pipe.unet.config, len(pipe.tokenizer)
    pairs = {
        "latent channels": (unet.in_channels, pipe.vae.config.latent_channels),
        "text width": (unet.cross_attention_dim, pipe.text_encoder.config.hidden_size),
    }
    wrong = [f"{name} {a} of the U-Net but {b} of its other part" for name, (a, b) in pairs.items() if a != b]
    if words < 512:  # each byte, inside and at the end of a word
        wrong.append(f"a tokenizer of {words} words, whose files are missing")
    if wrong:
        raise BackendError(f"model {model!r} is not a Stable Diffusion 1.x/2.x text-to-image pipeline: {'; '.join(wrong)}")


def missing_weights(model: str, path: Path, error: Exception) -> str:
    """One line that says what could not be loaded and what provides it."""
    reason = " ".join(str(error).split())[:200]
    if path.exists():
        if isinstance(error, LocalEntryNotFoundError):
            return f"model {model!r}: its configuration is not here and the hub is out of reach; name a folder in backend_config.config"
        return f"model {model!r} could not be loaded: expected a Stable Diffusion 1.x/2.x pipeline ({type(error).__name__}: {reason})"
    offline = "HF_HUB_OFFLINE is set; unset it, or " if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return (
        f"model {model!r} is neither a folder here nor available from the hub: {offline}run "
        f"'hf download {model}' (after 'hf auth login' and accepting its licence if it is gated), "
        f"or give a local folder with --model_path ({type(error).__name__}: {reason})"
    )
