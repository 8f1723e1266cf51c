"""Write the start tables under exps/: equally spaced points and equal weights, python -m
training.start_tables.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from backends.model_ids import MODELS
from common.errors import run_command
from solvers import NoiseSchedule, Predictor, SolverTable, Spec, discrete, flowmatch, save_predictor

NUM_POINTS = 2
# of the schedulers of the embedded digits: SD3's shift, and FLUX's mu for 16 tokens
DIGITS_SHIFT, DIGITS_MU = 3.0, 0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)


def stable_diffusion_noise() -> NoiseSchedule:
    """Stable Diffusion 1.x's training schedule: 1000 betas, linear in their square root, 0.00085 to 0.012, in
    float32 as trained.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return NoiseSchedule((1 - betas).cumprod(0))


@dataclass(frozen=True)
class StartTable:
    """One start table: its folder under exps, its settings, its nodes."""

    folder: str
    spec: Spec
    sigmas: Tensor

    @property
    def path(self) -> str:
        """Its file under exps."""
        return f"{self.folder}/start.pkl"


def start_table(folder: str, sigmas: Tensor, settings: Spec) -> StartTable:
    """A start table whose spec has what follows from its nodes."""
    discrete_nodes = settings.schedule_type == "discrete"
    spec = replace(
        settings,
        dataset_name="digits" if settings.backend == "digits" else "ms_coco",
        num_steps=len(sigmas),
        num_points=NUM_POINTS,
        guidance_type="cfg",
        schedule_rho=1.0,
        sigma_min=sigmas[-1].item() if discrete_nodes else 0.001,
        sigma_max=sigmas[0].item(),
    )
    return StartTable(folder, spec, sigmas)


def starts() -> list[StartTable]:
    """The start tables of the backbones, with the published numbers of nodes and guidance."""
    noise = stable_diffusion_noise()
    sd = Spec(backend="digits", guidance_rate=7.5, schedule_type="discrete")
    sd3 = Spec(backend="sd3", guidance_rate=4.5, schedule_type="flowmatch", flowmatch_shift=3.0)
    flux = Spec(backend="flux", guidance_rate=3.5, schedule_type="flowmatch", flowmatch_mu=1.15)
    sd15 = replace(sd, backend="ldm", backend_config={"model_name_or_path": MODELS["ldm"]})
    digits_sd3 = replace(
        sd3, backend="digits", backend_config={"family": "sd3"}, flowmatch_shift=DIGITS_SHIFT
    )
    digits_flux = replace(flux, backend="digits", backend_config={"family": "flux"}, flowmatch_mu=DIGITS_MU)
    tables = [
        start_table("digits", discrete(6, noise), sd),
        start_table("sd15", discrete(11, noise), sd15),
        start_table("digits-sd3", flowmatch(6, shift=DIGITS_SHIFT), digits_sd3),
        start_table("digits-flux", flowmatch(6, mu=DIGITS_MU), digits_flux),
    ]
    for resolution in (512, 1024):
        options = {"model_name_or_path": MODELS["sd3"], "resolution": resolution}
        spec = replace(sd3, backend_config=options)
        tables.append(start_table(f"sd3-{resolution}", flowmatch(11, shift=3.0), spec))
    options = {"model_name_or_path": MODELS["flux"], "resolution": 1024}
    tables.append(start_table("flux", flowmatch(9, mu=1.15), replace(flux, backend_config=options)))
    return tables


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
