"""What all diffusers families share: options, prompts to conditions, offloading, decoding, placing."""

import gc
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from common.resolution import image_size

from . import quiet  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline, ModelMixin  # isort: skip
from .base import Backend, BackendError, fingerprint_of
from .compiled import compile_blocks, compile_errors
from .conditioning import Condition
from .embeddings import EmbeddingCache
from .family import Options
from .timesteps import TimestepCache, flow_timesteps

COMMON_OPTIONS: Options = {  # name: type and meaning
    "model_name_or_path": (str, "folder, hub id or .safetensors/.ckpt file"),
    "revision": (str, "revision of a hub id"),
    "variant": (str, "file variant such as fp16"),
    "resolution": ((int, str), "pixels a side, or WIDTHxHEIGHT"),
    "enable_model_cpu_offload": (bool, "keep only the running model on the device"),
    "offload": (bool, "free the text encoders before the network is put on the device"),
    "compile": (bool, "compile the network's repeated blocks"),
    "torch_dtype": (str, "auto, float32, float16 or bfloat16"),
    "token": (str, "access token of the hub, never written to any file"),
    "use_safetensors": (bool, "true: safetensors weights only; false: pickled ones only"),
    "pipeline_kwargs": (dict, "more arguments of from_pretrained"),
}
SPECIAL = 3  # tokens at most that a tokenizer adds to a prompt's
# arguments of from_pretrained that run code which comes with the weights
RUNS_CODE = ("custom_pipeline", "custom_revision", "trust_remote_code")


class PipelineBackend(Backend):
    """A backbone that is a diffusers pipeline; a family adds `embed`, `velocity` and its noise levels.

    Attributes:
        pipe: the pipeline, frozen and on the device.
        config: the options that it was loaded with.
        network: the network that velocity evaluates, pipe's part named NETWORK.
    """

    NETWORK: str
    IMAGE_OPTIONS: Sequence[str]
    """The options, beside the weights, that change the images."""
    _fingerprint: str | None = None

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, config: dict, name: str):
        self.name, self.device, self.config, self.pipe = name, torch.device(device), config, pipe
        self.network = pipe.components[self.NETWORK]
        self.dtype = self.network.dtype
        place(pipe, self.network, self.device, config)
        self._timesteps = TimestepCache(self.timesteps, self.device)
        self._embeddings = EmbeddingCache(self.embed, self.device)

    @abstractmethod
    def embed(self, prompt: str) -> dict[str, Tensor]:
        """The text embeddings of one prompt: tensors [1, ...], by name."""

    def timesteps(self, sigma: Tensor) -> tuple[Tensor, ...]:
        """What the network gets of noise levels sigma [rows] float64; here the timesteps of flow matching."""
        return flow_timesteps(sigma)

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Condition:
        negative = None if guidance_scale == 1 else self.unconditional(prompts)
        return Condition(self._embeddings.stacked(prompts), negative, guidance_scale)

    def unconditional(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings [1, ...] that guidance moves away from: those of the negative prompt."""
        return self._embeddings.stacked([self.config.get("negative_prompt", "")])

    def token_limits(self) -> dict[str, int]:
        """How many tokens each text encoder reads, by the name of its tokenizer."""
        return {"tokenizer": self.pipe.tokenizer.model_max_length}

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        limits = self.token_limits()
        longest = max(limits.values())
        tokenizers = [(self.pipe.components[name], limit) for name, limit in limits.items()]
        return [
            prompt
            for prompt in prompts
            if len(prompt.encode()) + SPECIAL > longest  # a token is a byte at least
            and all(len(tokenizer(prompt).input_ids) > limit for tokenizer, limit in tokenizers)
        ]

    def networks(self) -> dict[str, torch.nn.Module]:
        return {self.NETWORK: self.network, **text_encoders(self.pipe)}

    def checkpoint_blocks(self) -> None:
        self.network.enable_gradient_checkpointing()

    def identity(self) -> str:
        if "identity" in self.config:
            return self.config["identity"]
        model, revision = self.config["model_name_or_path"], self.config.get("revision")
        return f"{model}@{revision}" if revision else model

    def image_options(self) -> dict:
        return {k: self.config[k] for k in self.IMAGE_OPTIONS if k in self.config}

    def forget_prompts(self) -> None:
        """Encode every prompt anew from here on."""
        self._embeddings.known.clear()

    def fingerprint(self) -> str:
        if not self.config.get("offload"):
            return super().fingerprint()
        if self._fingerprint is None:  # kept: it is of the text encoders too, which will be freed
            if self._embeddings.closed:
                raise BackendError(
                    "offload: the text encoders are freed, and a fingerprint is of all weights; leave"
                    " offload out"
                )
            self._fingerprint = super().fingerprint()
        return self._fingerprint

    def image_fingerprint(self) -> str:
        return fingerprint_of({"vae": self.pipe.vae}) + self.fingerprint()

    def precompute_embeddings(self, prompts: Sequence[str], guidance_scale: float) -> None:
        """With offload: encode all prompts, then free the text encoders for good."""
        if not (prompts and self.config.get("offload")):
            return
        for prompt in prompts:
            self.encode([prompt], guidance_scale)
            self._embeddings.check_capacity(len(prompts) + 1)
        self.offload_text_encoders()

    def offload_text_encoders(self) -> None:
        """With offload: free the text encoders, then put the other networks on the device; once."""
        if self._embeddings.closed or not self.config.get("offload"):
            return
        self._embeddings.closed = True
        self.pipe.register_modules(**dict.fromkeys(text_encoders(self.pipe)))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.pipe.to(self.device)

    def compiling(self) -> AbstractContextManager[None]:
        """Where the network is called: with compile, a failure to compile becomes one line."""
        return compile_errors() if self.config.get("compile") else nullcontext()

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """A few images at a time: 8 of 512 pixels a side, 2 of 1024; fewer where memory ends."""
        self.offload_text_encoders()
        height, width = (n * self.pipe.vae_scale_factor for n in latents.shape[-2:])
        chunk = chunk or max(1, min(8, 2**21 // (height * width)))
        return torch.cat([self._decoded(part) for part in latents.split(chunk)])

    def unscaled(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, of latents as the network has them."""
        vae = self.pipe.vae.config
        return latents / vae.scaling_factor + (vae.shift_factor or 0.0)

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        try:
            return (vae.decode(self.unscaled(latents).to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
        except torch.OutOfMemoryError:
            if len(latents) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self._decoded(part) for part in latents.split(-(-len(latents) // 2))])


def check_combinations(config: dict) -> None:
    """Refuse arguments that would run code or are options already, and options that contradict each other."""
    for name in config.get("pipeline_kwargs", {}):
        if name in RUNS_CODE:
            raise BackendError(
                f"backend_config.pipeline_kwargs.{name}: it would run code that comes with the weights; leave"
                " it out"
            )
        if name in (*COMMON_OPTIONS, "dtype"):
            raise BackendError(
                f"backend_config.pipeline_kwargs.{name}: give it as an option of its own,"
                f" backend_config.{name}"
            )
    if config.get("offload") and config.get("enable_model_cpu_offload"):
        raise BackendError(
            "backend_config: offload frees the text encoders, enable_model_cpu_offload keeps them: set one of"
            " the two to false"
        )


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The text encoders that a pipeline has, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and part is not None
    }


def place(pipe: DiffusionPipeline, network: ModelMixin, device: torch.device, config: dict) -> None:
    """Freeze the networks of a pipeline, compile `network` with the option compile, put them on the device.

    With offload only the text encoders go there now; with enable_model_cpu_offload each network while it
    runs.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    if config.get("compile"):
        compile_blocks(network)
    if config.get("offload"):
        for encoder in text_encoders(pipe).values():
            encoder.to(device)
    elif config.get("enable_model_cpu_offload"):
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)


def checked_size(config: dict, own: int, multiple: int, allowed: tuple[int, ...] = ()) -> tuple[int, int]:
    """Height and width in pixels: those of the option, or the pipeline's own; a misfit: BackendError.

    Args:
        config: the options.
        own: the pipeline's pixels a side.
        multiple: of which both must be.
        allowed: what the side of a square may be; any by default. A rectangle's may be others.
    """
    resolution = config.get("resolution", own)
    width, height = image_size(resolution)
    if min(width, height) <= 0 or width % multiple or height % multiple:
        raise BackendError(f"resolution {resolution!r}: expected a positive multiple of {multiple}")
    if allowed and width == height and width not in allowed:
        sides = " or ".join(map(str, allowed))
        raise BackendError(f"resolution {resolution}: expected {sides} for this model")
    return height, width
