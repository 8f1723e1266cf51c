"""What distillation learns: unconstrained parameters that always map to a valid table or tableau."""

import torch
from torch import Tensor, nn

from solvers import SolverTable, Tableau
from solvers.solver import Velocity

SMALLEST = (
    1e-6  # raised to this: a weight or gap, for a finite logarithm; a mean square, since 0 tells no direction
)


class TableStudent(nn.Module):
    """An EPD table in unconstrained float64 parameters (EPD-Solver, arXiv 2512.22796, with sorted positions).

    Positions are the cumulated softmax of K + 1 gap logits, weights a softmax, scales 2 h sigmoid(p / 2) + 1
    - h in (1 - h, 1 + h) for a half-range h; h = 0 leaves a scale out. Given `nodes` [N + 1], these are
    learned as well, between their fixed ends, as the softmax of the logits of their gaps. It starts exactly
    at `start` [N, K] (gaps and weights below 1e-6 raised to it); a scale of the start that h cannot reach:
    ValueError.
    """

    def __init__(
        self, start: SolverTable, scale_dir: float = 0.0, scale_time: float = 0.0, nodes: Tensor | None = None
    ):
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
                raise ValueError(
                    f"{name}: the start holds {value.flatten().tolist()}, outside 1 ± {half}; raise its"
                    " half-range"
                )
            if half:
                share = ((value - 1 + half) / (2 * half)).clamp(SMALLEST, 1 - SMALLEST)
                self.scales[name] = nn.Parameter(2 * torch.logit(share))
        self.ends = None if nodes is None else (nodes[0].item(), nodes[-1].item())
        if nodes is not None:
            self.node_logits = nn.Parameter((-nodes.diff()).log())

    def table(self) -> SolverTable:
        """The table of the present parameters, with gradients to them."""
        r = self.gap_logits.softmax(-1).cumsum(-1)[..., :-1]
        scales = {k: 2 * h * (self.scales[k] / 2).sigmoid() + 1 - h for k, h in self.half_ranges.items() if h}
        return SolverTable(r.clamp(max=1.0), self.weight_logits.softmax(-1), **scales)

    def nodes(self) -> Tensor | None:
        """The learned nodes [N + 1], strictly descending between the ends of the start's; None where they are
        not learned.
        """
        if self.ends is None:
            return None
        first, last = torch.tensor(self.ends, dtype=torch.float64)
        inner = first - (first - last) * self.node_logits.softmax(0).cumsum(0)[:-1]
        return torch.cat([first[None], inner, last[None]])


class TableauStudent(nn.Module):
    """A tableau whose rows and, if asked, noise levels are learned from a start; its levels stay.

    A stage's input is written as x_s = a_s x_0 + sum_j b_sj D_j with the denoised states D_j = x_j - sigma_j
    g_j of earlier levels (data prediction, as in DPM-Solver++, arXiv 2211.01095, section 4), and so is the
    result; any solver of the same levels is in reach. The denoised states are much alike, so each row is
    learned in the principal axes of `gram` [S + 1, S + 1], the second moments of x_0, D_1, ..., D_S along the
    start's own trajectories: a unit of any parameter then moves its state by one RMS, and one learning rate
    suits all. Axes of an RMS below `resolution` are moved by less. The first level sees x_0 itself, or x_0
    scaled down to the noise level of the stage.
    """

    def __init__(
        self, start: Tableau, learn_sigmas: bool = False, gram: Tensor | None = None, resolution: float = 1e-3
    ):
        super().__init__()
        count = 1 + start.evaluations
        gram = torch.eye(count, dtype=torch.float64) if gram is None else gram
        self.start = start
        self.register_buffer("weights", denoised_weights(start))
        self.register_buffer("axes", torch.stack([self._axes(gram, row, resolution) for row in range(count)]))
        self.register_buffer("sigma_units", _sigma_units(start, gram))
        self.row_change = nn.Parameter(torch.zeros(count, count, dtype=torch.float64))
        self.log_sigma_change = nn.Parameter(torch.zeros_like(start.sigmas), requires_grad=learn_sigmas)

    def _axes(self, gram: Tensor, row: int, resolution: float) -> Tensor:
        """The directions [S + 1, S + 1] in which a row is learned, one a column; 0 where it has fewer."""
        usable = _usable(self.start, row)
        axes = torch.zeros_like(gram)
        if usable:
            moments, directions = torch.linalg.eigh(gram[usable][:, usable])
            axes[usable, : len(usable)] = directions / (moments.clamp(min=0) + resolution**2).sqrt()
        return axes

    def tableau(self) -> Tableau:
        """The tableau of the present parameters, with gradients to them."""
        factor = (self.sigma_units * self.log_sigma_change).exp()
        sigmas = self.start.sigmas * factor
        weights = self.weights + (self.axes @ self.row_change[:, :, None])[..., 0]
        noise = weights[:, 0] * torch.cat(
            [factor, factor.new_ones(1)]
        )  # an input as noisy as the network is told
        rows, denoised = [], []
        unit = torch.eye(1 + len(sigmas), dtype=torch.float64)
        for s in range(len(sigmas) + 1):
            terms = [weights[s, j] * denoised[j - 1] for j in _usable(self.start, s)[1:]]
            rows.append(sum(terms, noise[s] * unit[0]))
            if s < len(sigmas):
                denoised.append(rows[s] - sigmas[s] * unit[1 + s])
        return Tableau(sigmas, torch.stack(rows[:-1]), rows[-1], self.start.levels, self.start.nodes)

    def distance(self) -> Tensor:
        """Mean squared change from the start: what regularisation holds down."""
        return torch.cat([self.row_change.flatten(), self.log_sigma_change]).square().mean()


def _usable(tableau: Tableau, row: int) -> list[int]:
    """What a row may combine: 0 for x_0 and 1 + j for D_j of the levels before its own; nothing in the first
    level.
    """
    done: list[int] = []
    for level in tableau.levels:
        if row in level:
            break
        done += level
    return [0, *sorted(1 + s for s in done)] if done else []


def _sigma_units(start: Tableau, gram: Tensor) -> Tensor:
    """Changes of log sigma [S] that change a stage's denoised state by about one RMS, at most 10; 0 where it
    sees x_0 itself.
    """
    units = torch.zeros_like(start.sigmas)
    for n, (level, after) in enumerate(zip(start.levels, [*start.levels[1:], None], strict=True)):
        for s in [s for s in level if n or start.stages[s, 0] != 1]:
            # the last level has none after it: as far as from the one before
            near = after[0] if after else start.levels[-2][0]
            apart = (
                (gram[1 + s, 1 + s] + gram[1 + near, 1 + near] - 2 * gram[1 + s, 1 + near])
                .clamp(min=SMALLEST)
                .sqrt()
            )
            units[s] = ((start.sigmas[near] / start.sigmas[s]).log().abs() / apart).clamp(0.1, 10.0)
    return units


def second_moments(tableau: Tableau, velocity: Velocity, x: Tensor) -> Tensor:
    """The mean products [S + 1, S + 1] of the entries of x_0 [B, ...] and the denoised states D_1, ..., D_S
    of a tableau.
    """
    denoised: list[Tensor] = []

    def record(inputs: Tensor, sigma: Tensor) -> Tensor:
        velocities = velocity(inputs, sigma)
        found = inputs - sigma.expand(len(inputs)).view(-1, *[1] * (inputs.ndim - 1)) * velocities
        denoised.extend(found.double().split(len(x)))
        return velocities

    tableau.step(record, x, tableau.sigmas, 0, ())
    order = [s for level in tableau.levels for s in level]
    states = torch.stack([x.double(), *[denoised[order.index(s)] for s in range(len(order))]]).flatten(1)
    return (states @ states.T / states.shape[1]).cpu()


def denoised_weights(tableau: Tableau) -> Tensor:
    """[S + 1, S + 1]: each stage row, then the output row, as a weight of x_0 and weights of D_j = x_j -
    sigma_j g_j.

    Rows and denoised states are triangular in the gradients, so the weights follow from the last gradient to
    the first. A stage at noise level 0, whose D tells nothing about its gradient: ValueError.
    """
    if (tableau.sigmas <= 0).any():
        raise ValueError(
            "a tableau with a stage at noise level 0 cannot be learned; choose a schedule that ends above 0"
        )
    weights = torch.cat([tableau.stages, tableau.output[None]]).clone()
    denoised = tableau.stages.clone()
    denoised[:, 1:] -= torch.diag(tableau.sigmas)
    order = [s for level in tableau.levels for s in level]
    for row in weights:
        rest = row.clone()
        for j in reversed(order):
            row[1 + j] = -rest[1 + j] / tableau.sigmas[j]
            rest -= row[1 + j] * denoised[j]
        row[0] = rest[0]
    return weights


def widen(tableau: Tableau, points: int, stride: int = 1, first: int = 1) -> Tableau:
    """The same sampler with idle stages to learn: `points` stages in every stride-th level after the first,
    `first` in that.

    A new stage lies between its level and the next, geometrically, on the line from x_0 to the level's own
    mixture of denoised states; nothing uses it yet. Those of the first level see x_0 scaled down to their
    noise level.
    """
    order = [s for level in tableau.levels for s in level]
    last = len(order)
    weights = denoised_weights(tableau)[[*order, last]][:, [0, *[1 + s for s in order]]]
    sigmas = tableau.sigmas[order]
    end = (weights[last, 0] * sigmas[0]).clamp(min=0.01 * sigmas[-1])
    after = torch.cat([sigmas[1:], end[None]])
    rows, noises, levels, place = [], [], [], {}
    position = 0
    for n, level in enumerate(tableau.levels):
        mine = range(position, position + len(level))
        position += len(level)
        wanted = first if n == 0 else points if n % stride == 0 else 1
        new = max(0, wanted - len(level))
        levels.append(tuple(range(len(rows), len(rows) + len(mine) + new)))
        for s in mine:
            place[s] = len(rows)
            rows.append(weights[s])
            noises.append(sigmas[s])
        for k in range(1, new + 1):
            s = mine[-1]
            share = k / (new + 1)
            noises.append(sigmas[s] ** (1 - share) * after[s] ** share)
            noise = noises[-1] / sigmas[0]
            mixture = weights[s, 1:] * (1 - noise) / (1 - weights[s, 0]) if n else weights[s, 1:]
            rows.append(torch.cat([noise[None], mixture]))
    return _assemble(
        [*rows, weights[last]], torch.stack(noises), levels, [place[s] for s in range(last)], tableau.nodes
    )


def _assemble(
    rows: list[Tensor], sigmas: Tensor, levels: list[tuple[int, ...]], place: list[int], nodes: Tensor | None
) -> Tableau:
    """The tableau of rows [x_0, D of old stage 0, 1, ...], where old stage j is now stage place[j]."""
    unit = torch.eye(1 + len(sigmas), dtype=torch.float64)
    stages: list[Tensor] = []
    for row in rows:
        terms = [
            row[1 + j] * (stages[new] - sigmas[new] * unit[1 + new])
            for j, new in enumerate(place)
            if row[1 + j] != 0
        ]
        stages.append(sum(terms, row[0] * unit[0]))
    return Tableau(sigmas, torch.stack(stages[:-1]), stages[-1], tuple(levels), nodes)
