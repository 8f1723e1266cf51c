"""Regional compilation: torch.compile on the blocks that a network repeats."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from . import quiet  # noqa: F401  isort: skip
from diffusers import ModelMixin  # isort: skip
from .base import BackendError

TORCH = {"dynamic": False, "fullgraph": True}
# compilations of one block's code; torch's own is 8, fewer than a U-Net and some batch sizes need
LIMIT = 1024


def compile_blocks(network: ModelMixin) -> None:
    """Compile the blocks that a network of diffusers repeats: once for each shape, by the first block that
    meets it.
    """
    import torch._dynamo.config as limits  # only here: it takes seconds to import

    limits.recompile_limit = max(limits.recompile_limit, LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, LIMIT)
    if network._repeated_blocks:
        network.compile_repeated_blocks(**TORCH)
        return
    for blocks in network.children():  # classes such as Stable Diffusion 3's do not name them
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.compile(**TORCH)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turn what torch raises at a block's first call, which compiles it, into a BackendError of one line."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise BackendError(
            f"compile: the network's blocks cannot be compiled on this machine ({reason}); leave compile out"
        ) from error


def compilations() -> int:
    """The number of graphs that this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
