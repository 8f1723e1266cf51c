"""What a run says of its held-out gain, and what to try where there is none."""

import torch

from solvers import SolverTable

from .config import PPOConfig


def gain_text(record: dict, name: str) -> str:
    """The held-out gain of an evaluation in words, with half its interval where there is one."""
    half = record.get(f"gain_{name}_halfwidth")
    return f"{record[f'gain_{name}']:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def no_signal(record: dict, name: str, step: int, config: PPOConfig, start: SolverTable) -> str | None:
    """A warning where the gain in a reward does not lie above 0 by more than half its interval; None where it
    does.
    """
    if record[f"gain_{name}"] > record.get(f"gain_{name}_halfwidth", 0.0):
        return None
    from_equal = equal_points(start)
    advice = ", ".join(f"{key}={value}" for key, value in better_settings(config, from_equal).items())
    remedies = [f"set {advice}"] if advice else []
    if from_equal:
        remedies = [
            "distil the start table first (training.distill.launch): its points are equally spaced",
            *remedies,
        ]
    remedy = (
        ", or ".join(remedies) or "raise ppo.steps, or check that the reward tells images of one prompt apart"
    )
    return f"no signal: after {step} steps the gain in {name} is {gain_text(record, name)}; {remedy}"


def better_settings(config: PPOConfig, from_equal: bool) -> dict[str, str | float | int]:
    """The settings that gained on the digits (README, "RDPO"), where a run has others.

    A distilled table gains from narrow exploration and many images a step; equal points only from wide
    exploration.
    """
    if from_equal:
        return (
            {}
            if config.dirichlet_concentration <= 100
            else {"ppo.dirichlet_concentration": 100, "ppo.learning_rate": 0.03}
        )
    known = {
        "ppo.policy": ("table", config.policy == "table"),
        "ppo.learning_rate": (0.01, config.learning_rate == 0.01),
        "ppo.dirichlet_concentration": (1000, config.dirichlet_concentration >= 1000),
        "ppo.rollout_batch_size": (64, config.rollout_batch_size >= 64),
    }
    return {key: value for key, (value, already) in known.items() if not already}


def equal_points(table: SolverTable) -> bool:
    """Whether all points are equally spaced, as in a start table in which nothing was learned (0.335 and
    0.665 in the published ones).
    """
    return torch.allclose(
        table.r, SolverTable.uniform(table.num_intervals, table.num_points).r, rtol=0, atol=0.01
    )
