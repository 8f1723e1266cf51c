"""Train the digits backbone, its judge and its reward from scikit-learn's bundled scans: python -m
digits.build.
"""

import shutil
import tempfile
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from backends import quiet  # noqa: F401  isort: skip
from . import FOLDER, REWARD_FOLDER, build_flow, data, judge, models
from .fit import fit

STEPS = {"judge": 2500, "vae": 2500, "unet": 9000, "reward": 3000}
CHECK_STEPS = {"judge": 6, "vae": 6, "unet": 6, "reward": 6}
VIEWS = 3  # augmented views of each training scan whose latents the U-Net sees


def drawings(grey: torch.Tensor, digits: torch.Tensor, generator: torch.Generator, held_out: bool = False):
    """Random drawings [n, 3, 32, 32] of grey scans and their labels; held-out combinations only if
    asked for.
    """
    pools = [
        [c for c in data.ALL_LABELS if c.digit == d and (held_out or c not in data.HELD_OUT_LABELS)]
        for d in range(10)
    ]
    u = torch.rand(len(grey), generator=generator).tolist()
    labels = [pools[d][int(u[i] * len(pools[d]))] for i, d in enumerate(digits.tolist())]
    colour, weight = (torch.tensor([vars(c)[k] for c in labels]) for k in ("colour", "weight"))
    return data.paint(grey, colour, weight), labels


def draw_batch(grey, digits, size, generator, held_out=False):
    """A training batch of augmented drawings and their labels."""
    pick = torch.randint(len(grey), (size,), generator=generator)
    return drawings(data.augment(grey[pick], generator), digits[pick], generator, held_out)


def train_judge(steps: int, work: Path, seed: int) -> judge.JudgeNet:
    """Cross-entropy on the three heads, over augmented drawings of the training scans with a little noise."""
    scans, digits = data.load_scans("train")
    grey = data.enlarge(scans)
    net = judge.JudgeNet()

    def loss_fn(generator):
        images, labels = draw_batch(grey, digits, 96, generator, held_out=True)
        images = images + 0.04 * torch.randn(images.shape, generator=generator)
        out = net(images)
        return sum(F.cross_entropy(out[k], torch.tensor([vars(c)[k] for c in labels])) for k in out)

    return fit(net, loss_fn, steps, 2e-3, work / "judge.pt", seed, ema_decay=0.99)


def save_judge(net: judge.JudgeNet, folder: Path) -> None:
    """Write the weights in fp16 and, beside them, the feature moments of every drawing of the
    held-out scans.
    """
    state = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in state.items()})
    images, _ = held_out_drawings()
    with torch.inference_mode():
        mean, cov = judge.moments(torch.cat([net.features(chunk) for chunk in images.split(256)]))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state | {"real.mean": mean.float(), "real.cov": cov.float()}, folder / "judge.safetensors")


def held_out_drawings() -> tuple[torch.Tensor, list[data.Label]]:
    """Each held-out scan in all 18 combinations of colour and weight."""
    scans, digits = data.load_scans("test")
    grey = data.enlarge(scans)
    images, labels = [], []
    for colour in range(len(data.COLOURS)):
        for weight in range(len(data.WEIGHTS)):
            n = len(grey)
            images.append(data.paint(grey, torch.full((n,), colour), torch.full((n,), weight)))
            labels += [data.Label(d, colour, weight) for d in digits.tolist()]
    return torch.cat(images), labels


def train_vae(steps: int, work: Path, seed: int):
    """Squared error plus a KL term of 1e-4 a latent element (Kingma and Welling 2014)."""
    scans, digits = data.load_scans("train")
    grey = data.enlarge(scans)
    vae = models.make_vae()

    def loss_fn(generator):
        images, _ = draw_batch(grey, digits, 32, generator)
        images = images * 2 - 1
        posterior = vae.encode(images).latent_dist
        return (
            F.mse_loss(vae.decode(posterior.sample(generator)).sample, images)
            + 1e-4 * posterior.kl().mean() / 256
        )

    vae = fit(vae, loss_fn, steps, 3e-3, work / "vae.pt", seed, ema_decay=0.99).requires_grad_(False)
    sample, _ = draw_batch(grey, digits, 1024, torch.Generator().manual_seed(seed))
    vae.register_to_config(scaling_factor=1 / vae.encode(sample * 2 - 1).latent_dist.mean.std().item())
    return vae


def latents_of_training_set(vae, generator: torch.Generator):
    """Scaled latents of VIEWS views of each training scan, each in 6 combinations, and their labels."""
    scans, digits = data.load_scans("train")
    grey = data.enlarge(scans).repeat(VIEWS, 1, 1)
    grey[len(scans) :] = data.augment(grey[len(scans) :], generator)
    latents, labels = [], []
    for _ in range(6):
        images, found = drawings(grey, digits.repeat(VIEWS), generator)
        for chunk in images.split(256):
            latents.append(vae.encode(chunk * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        labels += found
    return torch.cat(latents), labels


class Denoiser(torch.nn.Module):
    """The U-Net and its text encoder, trained together."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, timestep, tokens):
        return self.unet(noisy, timestep, self.text_encoder(tokens)[0]).sample


def random_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform, half around 600, where digit and colour are decided (sigma 1 to 8)."""
    uniform = torch.rand(n, generator=generator) * 1000
    middle = 600 + 200 * torch.randn(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.5, uniform, middle).clamp(0, 999).long()


def train_unet(steps: int, work: Path, seed: int, vae, tokenizer):
    """Noise prediction (Ho et al. 2020) with 12 % of the captions dropped for classifier-free guidance."""
    latents, labels = latents_of_training_set(vae, torch.Generator().manual_seed(seed))
    net = Denoiser(models.make_unet(), models.make_text_encoder(tokenizer))
    alphas = models.make_scheduler().alphas_cumprod
    cache: dict[str, list[int]] = {}

    def tokens_of(prompts):
        for p in {p for p in prompts if p not in cache}:
            cache[p] = tokenizer(
                p, padding="max_length", max_length=models.MAX_TOKENS, truncation=True
            ).input_ids
        return torch.tensor([cache[p] for p in prompts])

    def loss_fn(generator):
        pick = torch.randint(len(latents), (64,), generator=generator)
        dropped = (torch.rand(64, generator=generator) < 0.12).tolist()
        prompts = [
            "" if drop else data.random_caption(labels[i], generator)
            for i, drop in zip(pick.tolist(), dropped, strict=True)
        ]
        t = random_timesteps(64, generator)
        a = alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(latents[pick].shape, generator=generator)
        return F.mse_loss(
            net(a.sqrt() * latents[pick] + (1 - a).sqrt() * noise, t, tokens_of(prompts)), noise
        )

    return fit(net, loss_fn, steps, 2e-3, work / "unet.pt", seed, ema_decay=0.999)


def train_reward(steps: int, work: Path, seed: int, tokenizer):
    """Contrastive learning (Radford et al. 2021) of drawings and captions; all pairs that fit each other are
    positives.
    """
    scans, digits = data.load_scans("train")
    grey = data.enlarge(scans)
    net = models.make_reward(tokenizer)

    def loss_fn(generator):
        images, labels = draw_batch(grey, digits, 96, generator)
        images = images * 2 - 1 + 0.04 * torch.randn(images.shape, generator=generator)
        prompts = [data.random_caption(label, generator) for label in labels]
        tokens = tokenizer(
            prompts, padding="max_length", max_length=models.MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        logits = net(pixel_values=images, **tokens).logits_per_image
        asked = [data.parse(prompt) for prompt in prompts]
        fits = torch.tensor([[data.fits(label, wish) for wish in asked] for label in labels]).float()
        ways = [(logits, fits), (logits.T, fits.T)]
        return (
            sum(
                -(pairs / pairs.sum(1, keepdim=True) * way.log_softmax(1)).sum(1).mean()
                for way, pairs in ways
            )
            / 2
        )

    return fit(net, loss_fn, steps, 2e-3, work / "reward.pt", seed, ema_decay=0.99)


def save_reward(net, tokenizer, folder: Path) -> None:
    """Write the model in fp16 with its tokenizer and image processor, as a folder that transformers loads."""
    shutil.rmtree(folder, ignore_errors=True)
    net.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models.make_image_processor().save_pretrained(folder)


def build(
    out: Path,
    work: Path,
    steps: dict[str, int],
    seed: int,
    judge_folder: Path,
    reward_folder: Path,
    parts: tuple[str, ...],
) -> None:
    """Train the parts asked for and write the pipeline folder (fp16), the judge and the reward."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    captions = [data.random_caption(label, generator) for label in data.ALL_LABELS * 20]
    tokenizer = models.make_tokenizer(captions, work / "tokenizer")
    if "judge" in parts:
        save_judge(train_judge(steps["judge"], work, seed), judge_folder)
    if "sd" in parts:
        torch.manual_seed(seed + 1)
        vae = train_vae(steps["vae"], work, seed + 1)
        torch.manual_seed(seed + 2)
        denoiser = train_unet(steps["unet"], work, seed + 2, vae, tokenizer)
        pipe = models.make_pipeline(vae, denoiser.text_encoder, tokenizer, denoiser.unet).to(
            dtype=torch.float16
        )
        shutil.rmtree(out, ignore_errors=True)
        pipe.save_pretrained(out)
    if "reward" in parts:
        torch.manual_seed(seed + 3)
        save_reward(train_reward(steps["reward"], work, seed + 3, tokenizer), tokenizer, reward_folder)


PARTS = ("judge", "sd", "reward")


@click.command()
@click.option(
    "--part",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    help="Only this one; may be repeated. All by default.",
)
@click.option(
    "--family", type=click.Choice(["sd3", "flux"]), help="Train this twin instead, on the VAE that is there."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=FOLDER,
    show_default="package folder",
    help="Pipeline folder.",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("build/digits"),
    show_default=True,
    help="Checkpoints.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--check",
    is_flag=True,
    help="A few steps of each part into a temporary folder, to prove that the script runs.",
)
def main(parts: tuple[str, ...], family: str | None, out: Path, work: Path, seed: int, check: bool) -> None:
    """Train the digits backbone, its judge and its reward; an interrupted build goes on where it stopped."""
    parts = parts or PARTS
    if check:
        with tempfile.TemporaryDirectory() as tmp:
            tmp = Path(tmp)
            if family is not None:
                build_flow.build_family(family, tmp, build_flow.CHECK_STEPS, seed, tmp / "pipeline")
            else:
                build(tmp / "sd", tmp, CHECK_STEPS, seed, tmp / "judge", tmp / "reward", parts)
        click.echo("build check passed")
        return
    work.mkdir(parents=True, exist_ok=True)
    if family is not None:
        click.echo(f"wrote {build_flow.build_family(family, work, build_flow.STEPS, seed)}")
        return
    build(out, work, STEPS, seed, judge.FOLDER, REWARD_FOLDER, parts)
    folders = {"judge": judge.FOLDER, "sd": out, "reward": REWARD_FOLDER}
    click.echo(f"wrote {', '.join(str(folders[part]) for part in parts)}")


if __name__ == "__main__":
    main()
