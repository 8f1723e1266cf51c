"""Train the digits twins of Stable Diffusion 3 and FLUX.1 by flow matching on the latents of the
digits VAE.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from . import FOLDER, FOLDERS, data, flow_models
from .drawings import latents_of_training_set
from .fit import Net, Training, fit
from .models import MAX_TOKENS

STEPS = {"sd3": 8000, "flux": 8000, "guidance": 2500}
CHECK_STEPS = {"sd3": 10, "flux": 10, "guidance": 10}
BATCH, DROPPED = 64, 0.12
GUIDANCE = (1.0, 8.0)  # scales that the FLUX twin learns to follow


class Words:
    """Tokens of captions for both kinds of text encoder, each caption tokenised once."""

    def __init__(self, clip: CLIPTokenizer, t5: T5TokenizerFast):
        self.tokenizers = {"clip": clip, "t5": t5}
        self.known: dict[str, dict[str, list[int]]] = {}

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        for prompt in {p for p in prompts if p not in self.known}:
            options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
            self.known[prompt] = {
                k: tokenizer(prompt, **options).input_ids for k, tokenizer in self.tokenizers.items()
            }
        return {k: torch.tensor([self.known[p][k] for p in prompts]) for k in self.tokenizers}


@dataclass(frozen=True)
class Captioned:
    """Latents [n, 4, 8, 8] of drawings, their labels, and the tokens of captions."""

    latents: torch.Tensor
    labels: list[data.Label]
    words: Words

    def captions(self, pick: list[int], generator: torch.Generator, dropped: float) -> list[str]:
        """Random captions of some drawings, a share of them empty for classifier-free guidance."""
        empty = (torch.rand(len(pick), generator=generator) < dropped).tolist()
        return [
            "" if drop else data.random_caption(self.labels[i], generator)
            for i, drop in zip(pick, empty, strict=True)
        ]


def noised(
    latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (1 - t) x + t noise, times, and velocities noise - x; times are logit-normal (Esser et al. 2024,
    equation 19).
    """
    t = torch.sigmoid(torch.randn(len(latents), generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    share = t.view(-1, 1, 1, 1)
    return (1 - share) * latents + share * noise, t, noise - latents


def train_flow(net: Net, drawn: Captioned, training: Training) -> Net:
    """Conditional flow matching (Lipman et al. 2023) with dropped captions."""

    def loss_fn(generator):
        pick = torch.randint(len(drawn.latents), (BATCH,), generator=generator)
        x, t, velocity = noised(drawn.latents[pick], generator)
        tokens = drawn.words(drawn.captions(pick.tolist(), generator, DROPPED))
        return F.mse_loss(net(x, t, tokens, torch.ones(BATCH)), velocity)

    return fit(net, loss_fn, training)


def distil_guidance(teacher: Net, drawn: Captioned, training: Training) -> Net:
    """Guidance distillation (Meng et al. 2023): the student, with s as an input, learns v_u + s (v_c - v_u)
    of the teacher.
    """
    net = copy.deepcopy(teacher).requires_grad_(True).train()
    teacher.requires_grad_(False)
    low, high = GUIDANCE

    def loss_fn(generator):
        pick = torch.randint(len(drawn.latents), (BATCH,), generator=generator)
        x, t, _ = noised(drawn.latents[pick], generator)
        prompts = drawn.captions(pick.tolist(), generator, 0.0)
        scale = low + (high - low) * torch.rand(BATCH, generator=generator)
        with torch.no_grad():
            both = teacher(
                x.repeat(2, 1, 1, 1), t.repeat(2), drawn.words([""] * BATCH + prompts), torch.ones(2 * BATCH)
            )
            u, c = both.chunk(2)
            target = u + scale.view(-1, 1, 1, 1) * (c - u)
        return F.mse_loss(net(x, t, drawn.words(prompts), scale), target)

    return fit(net, loss_fn, training)


def build_family(
    family: str, work: Path, steps: dict[str, int], seed: int, folder: Path | None = None
) -> Path:
    """Train one twin and write its pipeline folder (fp16); an interrupted build goes on where it stopped."""
    sd = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, safety_checker=None)
    vae, clip = sd.vae.requires_grad_(False).eval(), sd.tokenizer
    generator = torch.Generator().manual_seed(seed)
    t5 = flow_models.make_t5_tokenizer(
        [data.random_caption(c, generator) for c in data.ALL_LABELS * 20], work / "t5"
    )
    latents, labels = latents_of_training_set(vae, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + 4)  # initial weights
    net = flow_models.SD3Denoiser(clip) if family == "sd3" else flow_models.FluxDenoiser(clip, t5)
    drawn = Captioned(latents, labels, Words(clip, t5))
    training = Training(steps[family], 2e-3, work / f"{family}.pt", seed + 4, ema_decay=0.999)
    net = train_flow(net, drawn, training)
    if family == "flux":
        training = Training(steps["guidance"], 1e-3, work / "flux-guidance.pt", seed + 5, ema_decay=0.999)
        net = distil_guidance(net, drawn, training)
    folder = folder or FOLDERS[family]
    shutil.rmtree(folder, ignore_errors=True)
    net.pipeline(vae, clip, t5).to(dtype=torch.float16).save_pretrained(folder)
    remove_path(folder / "vae" / "config.json")
    return folder


def remove_path(config: Path) -> None:
    """Remove the path of the machine that a configuration was made on."""
    values = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    config.write_text(json.dumps(values, indent=2) + "\n")
