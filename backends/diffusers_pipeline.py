"""What all diffusers families share: options, loading from a folder, hub id or file, and placing on a
device.
"""

import gc
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from . import quiet  # noqa: F401  isort: skip
from diffusers import DiffusionPipeline  # isort: skip
from huggingface_hub.errors import LocalEntryNotFoundError  # isort: skip
from .base import Backend, BackendError
from .compiled import compile_blocks, compile_errors

SINGLE_FILES = (".safetensors", ".ckpt")
COMMON_OPTIONS = {  # name: type and meaning
    "model_name_or_path": (str, "folder, hub id or .safetensors/.ckpt file"),
    "revision": (str, "revision of a hub id"),
    "variant": (str, "file variant such as fp16"),
    "resolution": (int, "pixels a side"),
    "enable_model_cpu_offload": (bool, "keep only the running model on the device"),
    "offload": (bool, "free the text encoders before the network is put on the device"),
    "compile": (bool, "compile the network's repeated blocks"),
    "torch_dtype": (str, "auto, float32, float16 or bfloat16"),
    "token": (str, "access token of the hub, never written to any file"),
    "use_safetensors": (bool, "true: safetensors weights only; false: pickled ones only"),
    "pipeline_kwargs": (dict, "more arguments of from_pretrained"),
}
RUNS_CODE = (
    "custom_pipeline",
    "custom_revision",
    "trust_remote_code",
)  # of from_pretrained: what comes with the weights would be run


class PipelineBackend(Backend):
    """A backbone that is a diffusers pipeline, `pipe`, with the options `config` that it was loaded with."""

    pipe: DiffusionPipeline
    config: dict
    _embeddings: "EmbeddingCache"
    IMAGE_OPTIONS: Sequence[str]
    """The options, beside the weights, that decide what the images look like."""
    _fingerprint: str | None = None

    def identity(self):
        if self.name == "digits":
            return "embedded"
        return self.config["model_name_or_path"] + (
            f"@{self.config['revision']}" if self.config.get("revision") else ""
        )

    def image_options(self):
        return {k: self.config[k] for k in self.IMAGE_OPTIONS if k in self.config}

    def forget_prompts(self) -> None:
        """Encode every prompt anew from here on."""
        self._embeddings.known.clear()

    def fingerprint(self):
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

    def precompute_embeddings(self, prompts, guidance_scale):
        """With offload: encode them all, then free the text encoders for good."""
        if not (prompts and self.config.get("offload")):
            return
        for prompt in prompts:
            self.encode([prompt], guidance_scale)
            self._embeddings.check_room(len(prompts) + 1)
        self.offload_text_encoders()

    def offload_text_encoders(self) -> None:
        """With offload, the first time: free the text encoders, and only then put the other networks on the
        device.
        """
        if self._embeddings.closed or not self.config.get("offload"):
            return
        self._embeddings.closed = True
        self.pipe.register_modules(**dict.fromkeys(text_encoders(self.pipe)))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.pipe.to(self.device)

    def compiling(self) -> AbstractContextManager[None]:
        """Where the network is called: with compile, a failure to compile is told in one line."""
        return compile_errors() if self.config.get("compile") else nullcontext()

    def decode(self, latents: Tensor, chunk: int | None = None):
        """A few images at a time: 8 of 512 pixels a side, 2 of 1024; fewer where memory ends."""
        self.offload_text_encoders()
        side = latents.shape[-1] * self.pipe.vae_scale_factor
        chunk = chunk or max(1, min(8, 2**21 // side**2))
        return torch.cat([self._decoded(part) for part in latents.split(chunk)])

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        try:
            scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            return (vae.decode(scaled.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
        except torch.OutOfMemoryError:
            if len(latents) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self._decoded(part) for part in latents.split(-(-len(latents) // 2))])


def check_combinations(config: dict) -> None:
    """Refuse arguments that would run code or are options of their own, and options that contradict each
    other.
    """
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


def load_pipeline(
    cls: type, config: dict, dtype: torch.dtype, expected: str, local_only: bool = False, **parts
) -> DiffusionPipeline:
    """A pipeline of config["model_name_or_path"]; missing, gated or broken weights: BackendError with the
    remedy.

    `expected` says what it should be; `parts` goes to from_pretrained. With `local_only` nothing is
    downloaded.
    """
    model = config["model_name_or_path"]
    looks_local = (
        model.endswith(SINGLE_FILES)
        or model.startswith((".", "/", "~"))
        or os.sep * 2 in model
        or model.count("/") > 1
    )
    path = Path(model).expanduser()
    if looks_local and not path.exists():
        raise BackendError(
            f"model {model!r} not found: expected a diffusers folder, a hub id, or a .safetensors/.ckpt file"
        )
    options = (
        {k: config[k] for k in ("revision", "variant", "token") if config.get(k)} | {"dtype": dtype} | parts
    )
    options |= config.get("pipeline_kwargs", {})
    try:
        if path.is_file():
            single = {"config": config["config"]} if config.get("config") else {}
            return cls.from_single_file(str(path), **single, **options)
        options |= {"use_safetensors": config["use_safetensors"]} if "use_safetensors" in config else {}
        options.setdefault("local_files_only", local_only)
        return cls.from_pretrained(str(path) if path.is_dir() else model, **options)
    except Exception as error:  # what the libraries raise for a broken file has no common type
        raise BackendError(missing_weights(model, path, error, expected, local_only)) from error


def absent_parts(config: dict) -> dict:
    """Parts that the folder's index says are absent, which from_pretrained wants to be told."""
    index = Path(config["model_name_or_path"]).expanduser() / "model_index.json"
    try:
        parts = json.loads(index.read_text()) if index.is_file() else {}
    except ValueError:
        return {}  # from_pretrained says what is wrong with it
    return {k: None for k, v in parts.items() if v == [None, None]} if isinstance(parts, dict) else {}


def missing_weights(model: str, path: Path, error: Exception, expected: str, local_only: bool) -> str:
    """One line that says what could not be loaded and what provides it."""
    reason = " ".join(str(error).split())[:200]
    if path.exists():
        if isinstance(error, LocalEntryNotFoundError):
            return (
                f"model {model!r}: its configuration is not here and the hub is out of reach; name a folder"
                " in backend_config.config"
            )
        return f"model {model!r} could not be loaded: expected {expected} ({type(error).__name__}: {reason})"
    offline = (
        "HF_HUB_OFFLINE is set; unset it, or "
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        else ""
    )
    where = (
        "neither a folder here nor in the local cache"
        if local_only
        else "neither a folder here nor available from the hub"
    )
    return (
        f"model {model!r} is {where}: {offline}run "
        f"'hf download {model}' (after 'hf auth login' and accepting its licence if it is gated), "
        f"or give a local folder with --model_path ({type(error).__name__}: {reason})"
    )


def text_encoders(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The text encoders that a pipeline has, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and part is not None
    }


def place(pipe: DiffusionPipeline, network: torch.nn.Module, device: torch.device, config: dict) -> None:
    """Freeze all networks of a pipeline, compile one if asked to, and put them on the device.

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


def checked_resolution(config: dict, own: int, multiple: int, allowed: tuple[int, ...] = ()) -> int:
    """Pixels a side: the option, or the pipeline's own; a misfit: BackendError."""
    pixels = config.get("resolution", own)
    if pixels <= 0 or pixels % multiple:
        raise BackendError(f"resolution {pixels!r}: expected a positive multiple of {multiple}")
    if allowed and pixels not in allowed:
        raise BackendError(f"resolution {pixels}: expected {' or '.join(map(str, allowed))} for this model")
    return pixels


class EmbeddingCache:
    """Text embeddings by prompt in host memory, each computed by itself so that it does not depend on its
    batch.

    The newest `limit` bytes are kept. Once `closed`, only those there are given.
    """

    def __init__(self, embed: Callable[[str], dict[str, Tensor]], device: torch.device, limit: int = 2**33):
        self.embed, self.device, self.limit = embed, device, limit
        self.known: dict[str, dict[str, Tensor]] = {}
        self.closed = False

    def __call__(self, prompt: str) -> dict[str, Tensor]:
        """The embedding of a prompt, in host memory."""
        if prompt not in self.known:
            if self.closed:
                raise BackendError(
                    f"offload: the text encoders are freed, and prompt {prompt[:60]!r} was not encoded"
                    " before; leave offload out"
                )
            with torch.inference_mode(False), torch.no_grad():  # kept for callers that differentiate as well
                embedding = {k: v.cpu() for k, v in self.embed(prompt).items()}
            while self.known and (len(self.known) + 1) * nbytes(embedding) > self.limit:
                self.known.pop(next(iter(self.known)))
            self.known[prompt] = embedding
        return self.known[prompt]

    def check_room(self, count: int) -> None:
        """Refuse to keep more embeddings than there is room for; they are all of one size."""
        need = count * nbytes(next(iter(self.known.values())))
        if need > self.limit:
            raise BackendError(
                f"offload: the embeddings of {count} prompts need {need / 2**30:.1f} GiB of host memory, more"
                f" than the {self.limit / 2**30:.1f} GiB set aside for them; sample in several runs, or leave"
                " offload out"
            )

    def stacked(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of several prompts on the device, a row each."""
        found = [self(p) for p in prompts]
        return {k: torch.cat([f[k] for f in found]).to(self.device) for k in found[0]}


def nbytes(embedding: dict[str, Tensor]) -> int:
    """The memory of an embedding."""
    return sum(t.nbytes for t in embedding.values())
