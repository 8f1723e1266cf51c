"""What distillation learns: unconstrained parameters that always map to a valid table or tableau."""

import torch
from torch import Tensor, nn

from solvers import SolverTable, Tableau

SMALLEST = 1e-6  # a weight or gap of the start is raised to this, so that it has a finite logarithm


class TableStudent(nn.Module):
    """An EPD table in unconstrained float64 parameters (EPD-Solver, arXiv 2512.22796, with sorted positions).

    Positions are the cumulated softmax of K + 1 gap logits, weights a softmax, scales 2 h sigmoid(p / 2) + 1 - h in
    (1 - h, 1 + h) for a half-range h; h = 0 leaves a scale out. It starts exactly at `start` [N, K] (gaps and
    weights below 1e-6 raised to it); a scale of the start that h cannot reach: ValueError.
    """

    def __init__(self, start: SolverTable, scale_dir: float = 0.0, scale_time: float = 0.0):
        super().__init__()
        start = SolverTable.sorted(**start.arrays())
        edges = torch.nn.functional.pad(start.r, (1, 0)), torch.nn.functional.pad(start.r, (0, 1), value=1.0)
        self.gap_logits = nn.Parameter((edges[1] - edges[0]).clamp(min=SMALLEST).log())
        self.weight_logits = nn.Parameter(start.w.clamp(min=SMALLEST).log())
        self.half_ranges = {"scale_dir": scale_dir, "scale_time": scale_time}
        self.scales = nn.ParameterDict()
        for name, half in self.half_ranges.items():
            value = start.arrays().get(name, torch.ones_like(start.r))
            if not 0 <= half < 1:
                raise ValueError(f"{name}: half-range {half}, expected 0 <= h < 1")
            if ((value - 1).abs() > half).any():
                raise ValueError(f"{name}: the start holds {value.flatten().tolist()}, outside 1 ± {half}; raise its half-range")
            if half:
                share = ((value - 1 + half) / (2 * half)).clamp(SMALLEST, 1 - SMALLEST)
                self.scales[name] = nn.Parameter(2 * torch.logit(share))

    def table(self) -> SolverTable:
        """The table of the present parameters, with gradients to them."""
        r = self.gap_logits.softmax(-1).cumsum(-1)[..., :-1]
        scales = {k: 2 * h * (self.scales[k] / 2).sigmoid() + 1 - h for k, h in self.half_ranges.items() if h}
        return SolverTable(r.clamp(max=1.0), self.weight_logits.softmax(-1), **scales)


class TableauStudent(nn.Module):
    """A tableau whose stage rows, output row and, if asked, noise levels are learned from a start; levels stay.

    Row s may use every gradient of an earlier level, also where the start has a zero, so that any solver of the same
    levels is in reach. Changes are measured in units of the row's step in sigma, so that one learning rate suits all
    rows. The coefficients of the start x_0 and the noise level of the first level stay as they are.
    """

    def __init__(self, start: Tableau, learn_sigmas: bool = False):
        super().__init__()
        self.start, self.learn_sigmas = start, learn_sigmas
        level = torch.empty(start.evaluations, dtype=torch.long)
        for i, stages in enumerate(start.levels):
            level[list(stages)] = i
        self.register_buffer("allowed", (level[:, None] > level[None, :]).to(start.stages.dtype))
        self.register_buffer("movable", (level > 0).to(start.stages.dtype))
        self.register_buffer("units", row_units(start, level))
        self.stage_change = nn.Parameter(torch.zeros_like(self.allowed))
        self.output_change = nn.Parameter(torch.zeros_like(start.output[1:]))
        self.log_sigma_change = nn.Parameter(torch.zeros_like(start.sigmas), requires_grad=learn_sigmas)

    def tableau(self) -> Tableau:
        """The tableau of the present parameters, with gradients to them."""
        start, units = self.start, self.units
        stages = start.stages[:, 1:] + units[:-1, None] * self.allowed * self.stage_change
        output = start.output[1:] + units[-1] * self.output_change
        sigmas = start.sigmas * (self.movable * self.log_sigma_change).exp()
        rows = torch.cat([start.stages[:, :1], stages], 1)
        return Tableau(sigmas, rows, torch.cat([start.output[:1], output]), start.levels, start.nodes)

    def distance(self) -> Tensor:
        """Mean squared change from the start, in row units: what regularisation holds down."""
        changes = [self.allowed * self.stage_change, self.output_change, self.movable * self.log_sigma_change]
        return sum(c.square().sum() for c in changes) / (self.allowed.sum() + len(self.output_change) + self.movable.sum())


def row_units(start: Tableau, level: Tensor) -> Tensor:
    """The step in sigma of each stage row from the level before, and of the output row: [S + 1], all above 0."""
    first = [start.sigmas[list(stages)].mean() for stages in start.levels]
    end = first[-1] if start.nodes is None else start.nodes[-1]
    before = torch.stack([first[0], *first[:-1]])[level]
    steps = torch.cat([(start.sigmas - before).abs(), (end - first[-1]).abs()[None]])
    return steps.clamp(min=0.01 * start.sigmas.max())
