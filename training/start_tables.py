"""Write the start tables under exps/: equally spaced points and equal weights, python -m
training.start_tables.
"""

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from common.errors import run_command
from solvers import NoiseSchedule, Predictor, SolverTable, Spec, discrete, flowmatch, save_predictor

NUM_POINTS = 2
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
DIGITS_SHIFT, DIGITS_MU = (
    3.0,
    0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256),
)  # the twins' schedulers; FLUX's mu for 16 tokens
FLUX = "black-forest-labs/FLUX.1-dev"


def stable_diffusion_noise() -> NoiseSchedule:
    """Stable Diffusion 1.x's training schedule: 1000 betas, linear in their square root, 0.00085 to 0.012, in
    float32 as trained.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return NoiseSchedule((1 - betas).cumprod(0))


@dataclass(frozen=True)
class Start:
    """One start table: where it goes, its settings, its nodes."""

    path: str
    spec: Spec
    sigmas: Tensor


def starts() -> list[Start]:
    """The start tables of the backbones, with the published numbers of nodes and guidance."""

    def spec(
        steps: int, backend: str, config: dict, guidance: float, schedule: str, nodes: Tensor, **more
    ) -> Spec:
        return Spec(
            dataset_name="digits" if backend == "digits" else "ms_coco",
            backend=backend,
            backend_config=config,
            num_steps=steps,
            num_points=NUM_POINTS,
            guidance_type="cfg",
            guidance_rate=guidance,
            schedule_type=schedule,
            schedule_rho=1.0,
            sigma_min=nodes[-1].item() if schedule == "discrete" else 0.001,
            sigma_max=nodes[0].item(),
            **more,
        )

    noise = stable_diffusion_noise()
    sd, sd3, flux = discrete(11, noise), flowmatch(11, shift=3.0), flowmatch(9, mu=1.15)
    digits = discrete(6, noise)
    table = [
        Start("digits/start.pkl", spec(6, "digits", {}, 7.5, "discrete", digits), digits),
        Start("sd15/start.pkl", spec(11, "ldm", {"model_name_or_path": SD15}, 7.5, "discrete", sd), sd),
    ]
    twins = flowmatch(6, shift=DIGITS_SHIFT), flowmatch(6, mu=DIGITS_MU)
    shifts = {"flowmatch_shift": DIGITS_SHIFT}, {"flowmatch_mu": DIGITS_MU}
    for family, guidance, nodes, shift in zip(("sd3", "flux"), (4.5, 3.5), twins, shifts, strict=True):
        path = f"digits-{family}/start.pkl"
        table.append(
            Start(path, spec(6, "digits", {"family": family}, guidance, "flowmatch", nodes, **shift), nodes)
        )
    for resolution in (512, 1024):
        config = {"model_name_or_path": SD3, "resolution": resolution}
        path = f"sd3-{resolution}/start.pkl"
        table.append(Start(path, spec(11, "sd3", config, 4.5, "flowmatch", sd3, flowmatch_shift=3.0), sd3))
    config = {"model_name_or_path": FLUX, "resolution": 1024}
    table.append(
        Start("flux/start.pkl", spec(9, "flux", config, 3.5, "flowmatch", flux, flowmatch_mu=1.15), flux)
    )
    return table


@click.command()
@click.option(
    "--exps", type=click.Path(path_type=Path), default=Path("exps"), show_default=True, help="Where to write."
)
def main(exps: Path) -> None:
    """Write the start table of every backbone."""
    for start in starts():
        table = SolverTable.uniform(len(start.sigmas) - 1, NUM_POINTS)
        provenance = {"kind": "start", "points": "equally spaced", "weights": "equal"}
        save_predictor(Predictor(table, start.spec, start.sigmas, provenance), exps / start.path)
        click.echo(f"wrote {exps / start.path}")


if __name__ == "__main__":
    run_command(main)
