"""The rows of a network's calls: what the tests of the speed benchmarks count in place of seconds."""

from collections.abc import Callable

from torch import nn


def rows_of_calls(network: nn.Module, work: Callable[[], object]) -> list[int]:
    """The rows of each call of a network while some work is done."""
    rows: list[int] = []

    def note(module, args: tuple, kwargs: dict) -> None:
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        work()
    finally:
        hook.remove()
    return rows
