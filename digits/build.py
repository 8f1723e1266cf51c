"""python -m digits.build: train the digits backbone, its judge and its reward on scikit-learn's scans."""

import shutil
import tempfile
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from backends import quiet  # noqa: F401  isort: skip
from . import FOLDER, REWARD_FOLDER, build_flow, data, judge, models
from .drawings import draw_batch, held_out_drawings, latents_of_training_set
from .fit import Training, fit

STEPS = {"judge": 2500, "vae": 2500, "unet": 9000, "reward": 3000}
CHECK_STEPS = {"judge": 6, "vae": 6, "unet": 6, "reward": 6}


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

    return fit(net, loss_fn, Training(steps, 2e-3, work / "judge.pt", seed, ema_decay=0.99))


def save_judge(net: judge.JudgeNet, folder: Path) -> None:
    """Write the weights in fp16 and, with them, the feature moments of all drawings of the held-out scans."""
    state = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    net.load_state_dict({k: v.float() for k, v in state.items()})
    images, _ = held_out_drawings()
    with torch.inference_mode():
        mean, cov = judge.moments(torch.cat([net.features(chunk) for chunk in images.split(256)]))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state | {"real.mean": mean.float(), "real.cov": cov.float()}, folder / "judge.safetensors")


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

    vae = fit(vae, loss_fn, Training(steps, 3e-3, work / "vae.pt", seed, ema_decay=0.99))
    vae.requires_grad_(False)
    sample, _ = draw_batch(grey, digits, 1024, torch.Generator().manual_seed(seed))
    vae.register_to_config(scaling_factor=1 / vae.encode(sample * 2 - 1).latent_dist.mean.std().item())
    return vae


class Denoiser(torch.nn.Module):
    """The U-Net and its text encoder, trained together."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy, timestep, tokens):
        return self.unet(noisy, timestep, self.text_encoder(tokens)[0]).sample


def random_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform, half around 600, where digit and colour take shape (sigma 1 to 8)."""
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

    return fit(net, loss_fn, Training(steps, 2e-3, work / "unet.pt", seed, ema_decay=0.999))


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

    return fit(net, loss_fn, Training(steps, 2e-3, work / "reward.pt", seed, ema_decay=0.99))


def save_reward(net, tokenizer, folder: Path) -> None:
    """Write the model in fp16 with its tokenizer and image processor, as a folder that transformers loads."""
    shutil.rmtree(folder, ignore_errors=True)
    net.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    models.make_image_processor().save_pretrained(folder)


def build(folders: dict[str, Path], work: Path, steps: dict[str, int], seed: int) -> None:
    """Train the parts that have a folder and write them there in fp16.

    Args:
        folders: where "judge", "sd" (the pipeline) and "reward" go; only those that are named are trained.
        work: folder of the checkpoints.
        steps: training steps of each network.
        seed: of the whole build.
    """
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)
    captions = [data.random_caption(label, generator) for label in data.ALL_LABELS * 20]
    tokenizer = models.make_tokenizer(captions, work / "tokenizer")
    if "judge" in folders:
        save_judge(train_judge(steps["judge"], work, seed), folders["judge"])
    if "sd" in folders:
        torch.manual_seed(seed + 1)
        vae = train_vae(steps["vae"], work, seed + 1)
        torch.manual_seed(seed + 2)
        denoiser = train_unet(steps["unet"], work, seed + 2, vae, tokenizer)
        pipe = models.make_pipeline(vae, denoiser.text_encoder, tokenizer, denoiser.unet).to(
            dtype=torch.float16
        )
        shutil.rmtree(folders["sd"], ignore_errors=True)
        pipe.save_pretrained(folders["sd"])
    if "reward" in folders:
        torch.manual_seed(seed + 3)
        save_reward(train_reward(steps["reward"], work, seed + 3, tokenizer), tokenizer, folders["reward"])


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
        with tempfile.TemporaryDirectory() as folder:
            check_build(Path(folder), parts, family, seed)
        click.echo("build check passed")
        return
    work.mkdir(parents=True, exist_ok=True)
    if family is not None:
        click.echo(f"wrote {build_flow.build_family(family, work, build_flow.STEPS, seed)}")
        return
    everything = {"judge": judge.FOLDER, "sd": out, "reward": REWARD_FOLDER}
    folders = {part: everything[part] for part in parts}
    build(folders, work, STEPS, seed)
    click.echo(f"wrote {', '.join(map(str, folders.values()))}")


def check_build(folder: Path, parts: tuple[str, ...], family: str | None, seed: int) -> None:
    """A few training steps of each part, or of a twin, written to a folder."""
    if family is not None:
        build_flow.build_family(family, folder, build_flow.CHECK_STEPS, seed, folder / "pipeline")
    else:
        build({part: folder / part for part in parts}, folder, CHECK_STEPS, seed)


if __name__ == "__main__":
    main()
