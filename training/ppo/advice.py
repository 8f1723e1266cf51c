"""The held-out gain of a run in words, and what to try where there is none."""

from .config import PPOConfig


def gain_text(record: dict, name: str) -> str:
    """The held-out gain of an evaluation in words, with half its interval where there is one."""
    half = record.get(f"gain_{name}_halfwidth")
    return f"{record[f'gain_{name}']:+.4f}" + ("" if half is None else f" ± {half:.4f}")


def no_signal(record: dict, name: str, step: int, config: PPOConfig, from_start: bool) -> str | None:
    """A warning where the gain in the reward does not lie above 0 by more than half its interval; None where
    it does.

    Args:
        record: of the evaluation.
        name: of the reward.
        step: after which it was.
        config: the run's ppo section.
        from_start: whether the run began at a table in which nothing was learned.
    """
    if record[f"gain_{name}"] > record.get(f"gain_{name}_halfwidth", 0.0):
        return None
    advice = ", ".join(f"{key}={value}" for key, value in better_settings(config, from_start).items())
    remedies = [f"set {advice}"] if advice else []
    if from_start:
        remedies = [
            "distil the start table first (training.distill.launch): its points are equally spaced",
            *remedies,
        ]
    remedy = (
        ", or ".join(remedies)
        or "raise ppo.steps, or check that the reward differs between images of one prompt"
    )
    return f"no signal: after {step} steps the gain in {name} is {gain_text(record, name)}; {remedy}"


def better_settings(config: PPOConfig, from_start: bool) -> dict[str, str | float | int]:
    """The settings that gained on the digits (docs/results.md), where a run has others.

    A distilled table gains from narrow exploration and many images a step; equal points only from wide
    exploration.
    """
    if config.policy == "gaussian":
        gained = {"ppo.learning_rate": 0.05, "ppo.rollout_batch_size": 64}
        settings = (config.learning_rate == 0.05, config.rollout_batch_size >= 64)
        return {k: v for (k, v), already in zip(gained.items(), settings, strict=True) if not already}
    concentration = config.dirichlet_concentration
    assert concentration is not None  # choose_exploration has set it
    if from_start:
        wide = concentration <= 100
        return {} if wide else {"ppo.dirichlet_concentration": 100, "ppo.learning_rate": 0.03}
    known: dict[str, tuple[str | float | int, bool]] = {
        "ppo.policy": ("table", config.policy == "table"),
        "ppo.learning_rate": (0.01, config.learning_rate == 0.01),
        "ppo.dirichlet_concentration": (1000, concentration >= 1000),
        "ppo.rollout_batch_size": (64, config.rollout_batch_size >= 64),
    }
    return {key: value for key, (value, already) in known.items() if not already}
