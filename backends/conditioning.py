"""Conditions of a network and classifier-free guidance (CFG)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the network gets besides x and sigma.

    Attributes:
        positive: embeddings by name, each [B, ...]; row b belongs to image b.
        negative: those of the negative prompt, each [1, ...], shared by all images; None without
            classifier-free guidance, which is guidance_scale 1.
        guidance_scale: s in u + s (c - u).
        renormalised: whether guidance keeps the norm of c along the last dimension, as Lumina's does.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    guidance_scale: float
    renormalised: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.positive.values())))

    def repeat(self, times: int) -> "Condition":
        """Point-major repetition: row m * B + b is row b."""
        return replace(
            self, positive={k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in self.positive.items()}
        )

    def select(self, indices: Sequence[int]) -> "Condition":
        """The rows of some images."""
        return replace(self, positive={k: v[list(indices)] for k, v in self.positive.items()})

    def branches(self) -> "list[Condition]":
        """The negative and the positive branch of CFG as conditions of their own; without CFG the condition
        itself.
        """
        if self.negative is None:
            return [self]
        negative = {k: v.expand(len(self), *v.shape[1:]) for k, v in self.negative.items()}
        return [replace(self, positive=part, negative=None) for part in (negative, self.positive)]

    def guided_batch(self, times: int = 1) -> dict[str, Tensor]:
        """The rows of one batch for CFG [negative of all, positive of all], or the positive rows without it.

        Those of `repeat(times)`, in one copy; without guidance and repetition in none.
        """
        if self.negative is None:
            return self.positive if times == 1 else self.repeat(times).positive
        rows = times * len(self)
        return {
            k: torch.cat([self.negative[k].expand(rows, *v.shape[1:]), *[v] * times])
            for k, v in self.positive.items()
        }


def repeat_condition(
    condition: Condition, rows: int, cache: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The batch for CFG of a condition repeated to `rows` rows.

    Args:
        condition: of B images.
        rows: M * B, the rows of the state.
        cache: the batches made so far, by their number of rows.
    """
    if rows not in cache:
        times, rest = divmod(rows, len(condition))
        if rest or not times:
            raise ValueError(f"{rows} rows for a condition of {len(condition)} images: expected a multiple")
        cache[rows] = condition.guided_batch(times)
    return cache[rows]


def apply_cfg(output: Tensor, condition: Condition) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): u + s (c - u) of a batch [u, c], in
    float32.
    """
    output = output.float()
    if condition.negative is None:
        return output
    u, c = output.chunk(2)
    guided = u + condition.guidance_scale * (c - u)
    if condition.renormalised:
        guided = guided * (c.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided
