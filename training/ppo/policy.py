"""The residual Dirichlet policy over solver tables (EPD-Solver, arXiv 2512.22796, stage 2), in float64."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solvers import SolverTable

from .base import Policy
from .residual import MLPResidual, Residual, TableResidual

SMALLEST = 1e-12  # a share of the simplex that was drawn is raised to this, so that its density is finite
SMALLEST_SHARE = 1e-6  # a segment or weight of a start table is raised to this
SCALES = ("scale_dir", "scale_time")


class TableSample(NamedTuple):
    """Sampled tables: segments [..., N, K + 1], which are the gaps between positions, weights [..., N, K],
    scales [..., N, K] where learned.
    """

    segments: Tensor
    weights: Tensor
    scale_dir: Tensor | None = None
    scale_time: Tensor | None = None

    def table(self) -> SolverTable:
        """As a table; a first dimension means one table an image."""
        return SolverTable.from_gaps(self.segments, self.weights, self.scale_dir, self.scale_time)

    def select(self, rows: slice | list[int]) -> "TableSample":
        """The tables of some images."""
        scales = (None if part is None else part[rows] for part in (self.scale_dir, self.scale_time))
        return TableSample(self.segments[rows], self.weights[rows], *scales)


class LogNormal(NamedTuple):
    """Independent log-normal scales: mean and standard deviation of their logarithm [..., N, K]."""

    loc: Tensor
    std: Tensor

    def sample(self, batch: int) -> Tensor:
        """Scales [batch, N, K] from the global random numbers."""
        return torch.exp(self.loc + self.std * torch.randn(batch, *self.loc.shape, dtype=torch.float64))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density summed over intervals and points."""
        return (torch.distributions.Normal(self.loc, self.std).log_prob(value.log()) - value.log()).sum(
            (-2, -1)
        )

    def entropy(self) -> Tensor:
        """Differential entropy, summed."""
        return (self.loc + torch.distributions.Normal(self.loc, self.std).entropy()).sum((-2, -1))

    def kl(self, other: "LogNormal") -> Tensor:
        """KL(self || other), summed."""
        p, q = (torch.distributions.Normal(d.loc, d.std) for d in (self, other))
        return torch.distributions.kl_divergence(p, q).sum((-2, -1))


class TableDistribution:
    """Independent Dirichlet distributions of each interval's segments [..., N, K + 1] and weights [..., N,
    K].

    Optional log-normal scales. Densities are summed over the table's intervals. A concentration at or below
    0, or shapes that do not fit: ValueError.
    """

    def __init__(
        self,
        alpha_pos: Tensor,
        alpha_weight: Tensor,
        scale_dir: LogNormal | None = None,
        scale_time: LogNormal | None = None,
    ):
        if (
            alpha_pos.shape[:-1] != alpha_weight.shape[:-1]
            or alpha_pos.shape[-1] != alpha_weight.shape[-1] + 1
        ):
            raise ValueError(
                f"policy: concentrations {list(alpha_pos.shape)} and {list(alpha_weight.shape)}, expected [N,"
                " K + 1] and [N, K]"
            )
        for name, alpha in (("alpha_pos", alpha_pos), ("alpha_weight", alpha_weight)):
            if not (alpha.isfinite().all() and (alpha > 0).all()):
                raise ValueError(
                    f"policy: {name} holds {alpha.min().item()}, expected finite concentrations above 0"
                )
        self.pos = torch.distributions.Dirichlet(alpha_pos, validate_args=False)
        self.weight = torch.distributions.Dirichlet(alpha_weight, validate_args=False)
        self.scales = {"scale_dir": scale_dir, "scale_time": scale_time}

    def sample(self, batch: int, seed: int) -> TableSample:
        """`batch` tables, which depend on the distribution and the seed alone."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            segments, weights = (_inside(d.sample(torch.Size([batch]))) for d in (self.pos, self.weight))
            scales = [None if s is None else s.sample(batch) for s in self.scales.values()]
        return TableSample(segments, weights, *scales)

    def log_prob(
        self,
        segments: Tensor,
        weights: Tensor,
        scale_dir: Tensor | None = None,
        scale_time: Tensor | None = None,
    ) -> Tensor:
        """Log density [...] of tables [..., N, K + 1] and [..., N, K], with their scales where these are
        drawn.
        """
        total = self.pos.log_prob(segments).sum(-1) + self.weight.log_prob(weights).sum(-1)
        for value, s in ((scale_dir, self.scales["scale_dir"]), (scale_time, self.scales["scale_time"])):
            if s is not None and value is not None:
                total = total + s.log_prob(value)
        return total

    def entropy(self) -> Tensor:
        """Differential entropy."""
        total = self.pos.entropy().sum(-1) + self.weight.entropy().sum(-1)
        return sum((s.entropy() for s in self.scales.values() if s is not None), total)

    def kl(self, other: "TableDistribution") -> Tensor:
        """KL(self || other)."""
        pairs = ((self.pos, other.pos), (self.weight, other.weight))
        total, more = (torch.distributions.kl_divergence(p, q).sum(-1) for p, q in pairs)
        total = total + more
        for s, s_other in zip(self.scales.values(), other.scales.values(), strict=True):
            if s is not None and s_other is not None:
                total = total + s.kl(s_other)
        return total

    def mean(self) -> SolverTable:
        """The table of mean shares and median scales: what is exported."""
        scales = [None if s is None else s.loc.exp() for s in self.scales.values()]
        return TableSample(self.pos.mean, self.weight.mean, *scales).table()


def _inside(shares: Tensor) -> Tensor:
    """Shares [..., n] without zeros, summing to 1."""
    shares = shares.clamp(min=SMALLEST)
    return shares / shares.sum(-1, keepdim=True)


def dirichlet_from_table(table: SolverTable, concentration: float) -> tuple[Tensor, Tensor]:
    """Concentrations [N, K + 1] of the segments and [N, K] of the weights whose mean is the table; each row
    sums to `concentration`.

    A concentration that is not above 0: ValueError.
    """
    if not 0 < concentration < float("inf"):
        raise ValueError(f"dirichlet_concentration is {concentration}, expected a number above 0")
    gaps, w = (part.double().clamp(min=SMALLEST_SHARE) for part in (table.gaps(), table.w))
    return concentration * gaps / gaps.sum(-1, keepdim=True), concentration * w / w.sum(-1, keepdim=True)


@dataclass(frozen=True)
class PolicySettings:
    """How a policy explores around a start table."""

    concentration: float
    """Sum of the concentrations of each simplex at the start."""
    scale_std: float = 0.05
    """Standard deviation of the logarithm of a learned scale."""
    learned_scales: tuple[str, ...] = ()
    """Of scale_dir and scale_time, those that are drawn; others stay the start's."""
    limit: float = 3.0
    """Largest change of a log concentration."""
    residual: str = "table"
    """table (one number a concentration) or mlp (published)."""
    seed: int = 0
    """Of the initial weights of an mlp."""
    frozen: tuple[int, ...] = ()
    """Intervals that stay the start's."""


class ResidualPolicy(Policy):
    """Log concentrations around a start table's, changed by a learned residual that is zero at first.

    The residual is bounded: limit * tanh(change / limit), so that no concentration leaves exp(+-limit) times
    its base.
    """

    base_log_alpha_pos: Tensor
    base_log_alpha_weight: Tensor

    narrower = "raise ppo.dirichlet_concentration"  # what makes its draws more alike

    def __init__(self, start: SolverTable, settings: PolicySettings, residual: Residual):
        super().__init__()
        table = SolverTable.sorted(**start.arrays())
        alpha_pos, alpha_weight = dirichlet_from_table(table, settings.concentration)
        self.register_buffer("base_log_alpha_pos", alpha_pos.log())
        self.register_buffer("base_log_alpha_weight", alpha_weight.log())
        self.limit, self.residual, self.scale_std = settings.limit, residual, settings.scale_std
        self.frozen = torch.zeros(len(table.r), 1, dtype=torch.bool)
        self.frozen[list(settings.frozen)] = True
        self.fixed: dict[str, Tensor] = {}
        self.drawn: list[str] = []
        for name in SCALES:
            value = table.arrays().get(name)
            if name in settings.learned_scales:
                self.drawn.append(name)
                median = (torch.ones_like(table.r) if value is None else value).clamp(min=SMALLEST_SHARE)
                self.register_buffer(f"base_log_{name}", median.log())
            elif value is not None:
                self.fixed[name] = value

    def forward(self) -> TableDistribution:
        """The distribution of the present parameters."""
        points = self.base_log_alpha_weight.shape[-1]
        change = self.residual()
        change = self.limit * torch.tanh(change / self.limit)
        if self.frozen.any():
            change = change.masked_fill(self.frozen.to(change.device), 0.0)
        pos, weight, *scales = change.split([points + 1, points, *[points] * len(self.drawn)], -1)
        std = torch.full_like(weight, self.scale_std)
        log_normals = {
            name: LogNormal(self.get_buffer(f"base_log_{name}") + self.scale_std * s, std)
            for name, s in zip(self.drawn, scales, strict=True)
        }
        return TableDistribution(
            (self.base_log_alpha_pos + pos).exp(), (self.base_log_alpha_weight + weight).exp(), **log_normals
        )

    def base(self) -> TableDistribution:
        """The distribution around the start table."""
        std = torch.full_like(self.base_log_alpha_weight, self.scale_std)
        log_normals = {name: LogNormal(self.get_buffer(f"base_log_{name}"), std) for name in self.drawn}
        return TableDistribution(
            self.base_log_alpha_pos.exp(), self.base_log_alpha_weight.exp(), **log_normals
        )

    def with_fixed_scales(self, table: SolverTable) -> SolverTable:
        """A drawn or mean table with the start's scales that are not learned."""
        if not self.fixed:
            return table
        shape = table.r.shape
        return SolverTable(**table.arrays(), **{k: v.expand(shape) for k, v in self.fixed.items()})

    def learned(self, draw: TableSample) -> SolverTable:
        """The tables of a draw, one an image; frozen intervals are the start's."""
        table = draw.table()
        if self.frozen.any():
            start, frozen = self.base().mean().arrays(), self.frozen.to(table.r.device)
            kept = {k: torch.where(frozen, start[k], v) for k, v in table.arrays().items()}
            table = SolverTable(**kept)
        return self.with_fixed_scales(table)

    def mean(self) -> SolverTable:
        """The mean table: what is exported."""
        return self.with_fixed_scales(self().mean())

    def start_mean(self) -> SolverTable:
        """The mean table around the start."""
        return self.with_fixed_scales(self.base().mean())

    def drift(self) -> dict[str, float]:
        """Concentration sums, and how far the mean table is from the start's."""
        with torch.no_grad():
            distribution, base = self(), self.base()
            now, start = distribution.mean(), base.mean()
            sums = [d.concentration.sum(-1).mean().item() for d in (distribution.pos, distribution.weight)]
        return {
            "concentration_pos": sums[0],
            "concentration_weight": sums[1],
            "drift_r": (now.r - start.r).abs().mean().item(),
            "drift_w": (now.w - start.w).abs().mean().item(),
        }

    def describe(self, learned: Any) -> dict[str, list]:
        """A table's numbers for an evaluation record."""
        return {"r": learned.r.tolist(), "w": learned.w.tolist()}

    def drawn_numbers(self, draw: Any, image: int) -> dict[str, list]:
        """What was drawn for an image, for the record of a skipped step."""
        return {"positions": draw.table().r[image].tolist(), "weights": draw.weights[image].tolist()}

    def residual_parameters(self) -> list[nn.Parameter]:
        return self.residual.outputs()


def make_policy(start: SolverTable, settings: PolicySettings) -> ResidualPolicy:
    """A policy around a start table."""
    outputs = 2 * start.num_points + 1 + len(settings.learned_scales) * start.num_points
    if settings.residual == "table":
        residual: Residual = TableResidual(start.num_intervals, outputs)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            residual = MLPResidual(start.num_intervals, outputs)
    return ResidualPolicy(start, settings, residual)
