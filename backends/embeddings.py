"""Text embeddings by prompt, kept in host memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import BackendError


class EmbeddingCache:
    """Text embeddings by prompt in host memory, each computed by itself, so that none depends on its batch.

    The newest `limit` bytes are kept. A cache that is `closed` has only the embeddings that are in it.
    """

    def __init__(self, embed: Callable[[str], dict[str, Tensor]], device: torch.device, limit: int = 2**33):
        self.embed, self.device, self.limit = embed, device, limit
        self.known: dict[str, dict[str, Tensor]] = {}
        self.closed = False

    def __call__(self, prompt: str) -> dict[str, Tensor]:
        """The embedding of a prompt, in host memory."""
        if prompt not in self.known:
            if self.closed:
                raise BackendError(
                    f"offload: the text encoders are freed, and prompt {prompt[:60]!r} was not encoded"
                    " before; leave offload out"
                )
            with torch.inference_mode(False), torch.no_grad():  # kept for callers that differentiate as well
                embedding = {k: v.cpu() for k, v in self.embed(prompt).items()}
            while self.known and (len(self.known) + 1) * nbytes(embedding) > self.limit:
                self.known.pop(next(iter(self.known)))
            self.known[prompt] = embedding
        return self.known[prompt]

    def check_capacity(self, count: int) -> None:
        """Refuse to keep more embeddings than the limit allows; they are all of one size."""
        need = count * nbytes(next(iter(self.known.values())))
        if need > self.limit:
            raise BackendError(
                f"offload: the embeddings of {count} prompts need {need / 2**30:.1f} GiB of host memory, more"
                f" than the {self.limit / 2**30:.1f} GiB set aside for them; sample in several runs, or leave"
                " offload out"
            )

    def stacked(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embeddings of several prompts on the device, a row each."""
        rows = [self(prompt) for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}


def nbytes(embedding: dict[str, Tensor]) -> int:
    """The memory of an embedding in bytes."""
    return sum(t.nbytes for t in embedding.values())
