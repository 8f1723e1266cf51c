"""Training of the digits twins of Stable Diffusion 3 and FLUX.1, by flow matching on the latents of the
digits VAE.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline

from . import FOLDER, FOLDERS, data, flow_models
from .fit import fit
from .models import MAX_TOKENS

STEPS = {"sd3": 8000, "flux": 8000, "guidance": 2500}
CHECK_STEPS = {"sd3": 10, "flux": 10, "guidance": 10}
BATCH, DROPPED = 64, 0.12
GUIDANCE = (1.0, 8.0)  # scales that the FLUX twin learns to follow


class Words:
    """Tokens of captions for both kinds of text encoder, each caption tokenised once."""

    def __init__(self, clip, t5):
        self.tokenizers, self.known = {"clip": clip, "t5": t5}, {}

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        for prompt in {p for p in prompts if p not in self.known}:
            options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
            self.known[prompt] = {
                k: tokenizer(prompt, **options).input_ids for k, tokenizer in self.tokenizers.items()
            }
        return {k: torch.tensor([self.known[p][k] for p in prompts]) for k in self.tokenizers}


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


def captions_of(labels, pick: list[int], generator: torch.Generator, dropped: float) -> list[str]:
    """Random captions of some drawings, a share of them empty for classifier-free guidance."""
    empty = (torch.rand(len(pick), generator=generator) < dropped).tolist()
    return [
        "" if gone else data.random_caption(labels[i], generator) for i, gone in zip(pick, empty, strict=True)
    ]


def train_flow(net, latents, labels, words: Words, steps: int, checkpoint: Path, seed: int):
    """Conditional flow matching (Lipman et al. 2023) with dropped captions."""

    def loss_fn(generator):
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        x, t, velocity = noised(latents[pick], generator)
        tokens = words(captions_of(labels, pick.tolist(), generator, DROPPED))
        return F.mse_loss(net(x, t, tokens, torch.ones(BATCH)), velocity)

    return fit(net, loss_fn, steps, 2e-3, checkpoint, seed, ema_decay=0.999)


def distil_guidance(teacher, latents, labels, words: Words, steps: int, checkpoint: Path, seed: int):
    """Guidance distillation (Meng et al. 2023): one evaluation that is told s learns v_u + s (v_c - v_u) of
    the teacher.
    """
    net = copy.deepcopy(teacher).requires_grad_(True).train()
    teacher.requires_grad_(False)
    low, high = GUIDANCE

    def loss_fn(generator):
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        x, t, _ = noised(latents[pick], generator)
        prompts = captions_of(labels, pick.tolist(), generator, 0.0)
        scale = low + (high - low) * torch.rand(BATCH, generator=generator)
        with torch.no_grad():
            both = teacher(
                x.repeat(2, 1, 1, 1), t.repeat(2), words([""] * BATCH + prompts), torch.ones(2 * BATCH)
            )
            u, c = both.chunk(2)
            target = u + scale.view(-1, 1, 1, 1) * (c - u)
        return F.mse_loss(net(x, t, words(prompts), scale), target)

    return fit(net, loss_fn, steps, 1e-3, checkpoint, seed, ema_decay=0.999)


def build_family(
    family: str, work: Path, steps: dict[str, int], seed: int, folder: Path | None = None
) -> Path:
    """Train one twin and write its pipeline folder (fp16); an interrupted build goes on where it stopped."""
    from .build import latents_of_training_set

    sd = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, safety_checker=None)
    vae, clip = sd.vae.requires_grad_(False).eval(), sd.tokenizer
    generator = torch.Generator().manual_seed(seed)
    t5 = flow_models.make_t5_tokenizer(
        [data.random_caption(c, generator) for c in data.ALL_LABELS * 20], work / "t5"
    )
    latents, labels = latents_of_training_set(vae, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + 4)  # initial weights
    net = flow_models.SD3Denoiser(clip) if family == "sd3" else flow_models.FluxDenoiser(clip, t5)
    words = Words(clip, t5)
    net = train_flow(net, latents, labels, words, steps[family], work / f"{family}.pt", seed + 4)
    if family == "flux":
        net = distil_guidance(
            net, latents, labels, words, steps["guidance"], work / "flux-guidance.pt", seed + 5
        )
    folder = folder or FOLDERS[family]
    shutil.rmtree(folder, ignore_errors=True)
    net.pipeline(vae, clip, t5).to(dtype=torch.float16).save_pretrained(folder)
    config = folder / "vae" / "config.json"
    told = {
        k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"
    }  # a path of the machine it was made on
    config.write_text(json.dumps(told, indent=2) + "\n")
    return folder
