"""Networks whose repeated blocks are compiled (torch.compile): how, what it says where it cannot, and how
often it happened.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .base import BackendError

TORCH = {"dynamic": False, "fullgraph": True}
LIMIT = (
    1024  # compilations of one block's code; torch's own is 8, fewer than a U-Net and some batch sizes need
)


def compile_blocks(network: nn.Module) -> None:
    """Compile the blocks that a network repeats (regional compilation): once for each shape, whichever block
    meets it first.
    """
    import torch._dynamo.config as limits  # only here: it takes seconds to import

    limits.recompile_limit = max(limits.recompile_limit, LIMIT)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, LIMIT)
    if network._repeated_blocks:
        network.compile_repeated_blocks(**TORCH)
        return
    for block in network.transformer_blocks:  # Stable Diffusion 3's class does not name them
        block.compile(**TORCH)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Compilation happens at a block's first call: what torch raises there becomes one line."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise BackendError(
            f"compile: the network's blocks cannot be compiled on this machine ({reason}); leave compile out"
        ) from error


def compilations() -> int:
    """How many graphs this process has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
