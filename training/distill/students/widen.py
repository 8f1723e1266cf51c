"""A tableau in weights of denoised states, and the same sampler with more stages."""

import torch
from torch import Tensor

from solvers import Tableau


def denoised_weights(tableau: Tableau) -> Tensor:
    """[S + 1, S + 1]: each stage row, then the output row, as a weight of x_0 and weights of D_j = x_j -
    sigma_j g_j.

    Rows and denoised states are triangular in the gradients, so the weights follow from the last gradient to
    the first. A stage at noise level 0, whose D does not depend on its velocity: ValueError.
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
    rows: list[Tensor] = []
    noises: list[Tensor] = []
    levels: list[tuple[int, ...]] = []
    place: dict[int, int] = {}  # of an old stage among the new ones
    position = 0
    for n, level in enumerate(tableau.levels):
        own = range(position, position + len(level))
        position += len(level)
        stages = first if n == 0 else points if n % stride == 0 else 1
        new = max(0, stages - len(level))
        levels.append(tuple(range(len(rows), len(rows) + len(own) + new)))
        for s in own:
            place[s] = len(rows)
            rows.append(weights[s])
            noises.append(sigmas[s])
        for k in range(1, new + 1):
            s = own[-1]
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
