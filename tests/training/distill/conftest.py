"""Small distillation problems with exact answers."""

import pytest
import torch

from backends import Backend, Condition
from backends.conditioning import repeat_condition
from common.distributed import Ranks
from solvers import NoiseSchedule
from training.distill.config import DistillConfig
from training.distill.setup import prepare
from training.processes import Processes
from training.run_folder import RunFolder

ALONE = Ranks(0, 1, torch.device("cpu"))


class Line(Backend):
    """Two points -1 and +1 blurred by 0.25, one number a latent: velocity (x - E[x0 | x]) / sigma, in
    float64.
    """

    name, dtype, latent_shape = "line", torch.float64, (1, 1, 1)
    noise_schedule = NoiseSchedule(
        (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    )
    sigma_min, sigma_max = 0.1, 5.0
    default_schedule = "polynomial"
    device = torch.device("cpu")
    calls = 0

    def identity(self):
        return "two points"

    def encode(self, prompts, guidance_scale):
        return Condition({"text": torch.zeros(len(prompts), 1)}, None, guidance_scale)

    def velocity(self, condition):
        cache: dict = {}

        def velocity(x, sigma):
            repeat_condition(condition, len(x), cache)
            self.calls += 1
            return line_velocity(x.double(), sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma)

        return velocity

    def decode(self, latents):
        return (latents.float().expand(-1, 3, -1, -1) / 4 + 0.5).clamp(0, 1)


def line_velocity(x, sigma):
    """The velocity at x of the two blurred points."""
    variance = 0.25**2 + sigma**2
    mean = torch.tanh(x / variance)
    return sigma / variance * (x - mean)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(40)))
    return path


@pytest.fixture
def trainer_of(tmp_path, prompts):
    """A function from a configuration and a backend to a trainer in a fresh run folder."""

    def make(config: DistillConfig, backend: Backend, name: str = "run"):
        config.bank.folder, config.bank.prompts = str(tmp_path / "banks"), str(prompts)
        run = RunFolder(tmp_path / name)
        for folder in (run.config.parent, run.metrics.parent, run.checkpoints, run.export):
            folder.mkdir(parents=True)
        return prepare(config, None, backend, run, Processes(ALONE))[0]

    return make
