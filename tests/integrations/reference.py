"""The project's solvers on the velocity of a pipeline's own loop body: what drop-ins are compared with."""

import logging
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.logging import get_verbosity, set_verbosity, set_verbosity_warning
from torch import Tensor

from solvers import (
    DPM2,
    EPD,
    IPNDM,
    Euler,
    NoiseSchedule,
    Predictor,
    SolverTable,
    Spec,
    Tableau,
    compile_tableau,
    sample,
    save_predictor,
)

EXPS = Path(__file__).parents[2] / "exps"
CLOSE = 5e-5


def table_file(name: str) -> Path:
    """The distilled predictor of a name: of the grid of digits, such as epd-g7.5-d4, or of a family's
    folder.
    """
    family = {"epd-g4.5-d4": "digits-sd3", "epd-g3.5-d4": "digits-flux"}.get(name)
    path = EXPS / "digits/grid" / f"{name}.pkl" if family is None else EXPS / family / "distilled.pkl"
    assert path.is_file(), f"no distilled table {name} under {EXPS}"
    return path


class Probe(SchedulerMixin, ConfigMixin):
    """A scheduler of one call at one noise level, which keeps the network's guided output."""

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, base_shift: float = 0.5, num_train_timesteps: int = 1000):
        self.timesteps, self.scale, self.output = torch.empty(0), 1.0, None

    def at(self, time: float, scale: float) -> "Probe":
        self.time, self.scale = time, scale
        return self

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        self.timesteps = torch.tensor([self.time], dtype=torch.float32)

    def set_begin_index(self, begin_index=0):
        pass

    def scale_model_input(self, x, timestep=None):
        return x * self.scale

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        self.output = model_output.float()
        return sample, sample  # PixArt takes the second where there is one step


def velocity_of(case, config, **options):
    """velocity(x [M*B, ...], sigma) of a pipeline, guidance and all: each point is one call with one step.

    `config` is the stock scheduler's, which says whether this is a flow or a model with a noise schedule.
    """
    probe = Probe()
    flow = "beta_start" not in config or config.get("prediction_type") == "flow_prediction"
    schedule = None if flow else NoiseSchedule(alphas_of(config))

    def one(x: Tensor, sigma: Tensor) -> Tensor:
        scale = 1.0 if flow else (1 + sigma.item() ** 2) ** -0.5
        time = 1000 * sigma.item() if flow else 1000 * schedule.t(sigma).item() - 1
        case.latents(probe.at(time, scale), 1, x, **options)
        if config.get("prediction_type") == "v_prediction":
            return scale * (probe.output + sigma.item() * scale * x)
        return probe.output

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        images = options.get("images", 1)
        sigmas = sigma.expand(len(x))[::images]
        return torch.cat([one(part, s) for part, s in zip(x.split(images), sigmas, strict=True)])

    return velocity


def alphas_of(config) -> Tensor:
    """The noise schedule of a scheduler configuration, by the DDIM scheduler of diffusers."""
    from diffusers import DDIMScheduler

    betas = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    return DDIMScheduler(**betas).alphas_cumprod


def own_latents(predictor: Predictor, velocity, noise: Tensor) -> Tensor:
    """The latents of the project's own solver, a point at a time."""
    nodes = predictor.sigmas
    return sample(predictor.solver(parallel=False), velocity, noise * nodes[0].item(), nodes)


def stock_table(nodes, folder: Path) -> Path:
    """An Euler table on a stock scheduler's nodes, as a predictor file of no backbone."""
    nodes = torch.as_tensor(nodes, dtype=torch.float64)
    return _saved(compile_tableau(Euler(), nodes), nodes, folder / "euler.pkl")


def random_table(kind: str, nodes: Tensor, folder: Path, backend: str) -> Path:
    """A table of a kind with random coefficients on nodes [N]: epd, plugin, tableau1, tableau2 or wide2."""
    torch.manual_seed(len(kind))
    path, n = folder / f"{kind}.pkl", len(nodes) - 1
    if kind in ("epd", "plugin"):
        r, w = torch.rand(n, 2).double().sort(-1).values, torch.rand(n, 2).double().softmax(-1)
        scales = {
            "scale_dir": 1 + 0.05 * torch.randn(n, 2).double(),
            "scale_time": 1 + 0.02 * torch.randn(n, 2).double(),
        }
        spec = Spec(backend=backend, num_steps=n + 1, max_order=2 if kind == "plugin" else 1)
        save_predictor(Predictor(SolverTable(r.clamp(0.05, 0.95), w, **scales), spec, nodes), path)
        return path
    if kind == "tableau1":
        return _saved(_moved(compile_tableau(IPNDM(2), nodes)), nodes, path, backend)
    if kind == "tableau2":
        solver = EPD(SolverTable.uniform(n, 2), max_order=2)
        return _saved(_moved(compile_tableau(solver, nodes)), nodes, path, backend)
    assert kind == "wide2", kind
    base = compile_tableau(DPM2(), nodes)
    return _saved(_moved(_doubled(base)), nodes, path, backend)


def _moved(t: Tableau) -> Tableau:
    """All numbers but those of the first stage a little changed, with those that are 0 left so."""
    stages, output = (
        t.stages * (1 + 0.02 * torch.randn_like(t.stages)),
        t.output * (1 + 0.02 * torch.randn_like(t.output)),
    )
    stages[0] = t.stages[0]
    return Tableau(
        t.sigmas * (1 + 0.01 * torch.randn_like(t.sigmas)).clamp(max=1), stages, output, t.levels, t.nodes
    )


def _doubled(t: Tableau) -> Tableau:
    """Each stage twice in its level, with its weights shared out."""
    rows = t.stages.repeat_interleave(2, 0)
    spread = torch.cat([rows[:, :1], rows[:, 1:].repeat_interleave(2, 1) / 2], 1)
    output = torch.cat([t.output[:1], t.output[1:].repeat_interleave(2) / 2])
    levels = tuple(tuple(2 * s + i for s in level for i in range(2)) for level in t.levels)
    return Tableau(t.sigmas.repeat_interleave(2), spread, output, levels, t.nodes)


def _saved(tableau: Tableau, nodes: Tensor, path: Path, backend: str | None = None) -> Path:
    spec = Spec(backend=backend, solver="tableau", num_steps=len(nodes))
    save_predictor(Predictor(tableau, spec, nodes), path)
    return path


@contextmanager
def capture_warnings():
    """The messages of the scheduler's logger."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger, before = logging.getLogger("diffusers.integrations.diffusers.epd_scheduler"), get_verbosity()
    logger.addHandler(handler)
    set_verbosity_warning()
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        set_verbosity(before)
