"""What an RDPO configuration may hold, checked before anything loads."""

from backends import NAMES, SCHEDULES
from rewards import NAMES as REWARDS
from rewards import TRAINABLE

from ..config import ConfigError, check_choices, check_ranges, or_code, value_at
from .config import RDPOConfig

LOWEST: dict[str, float] = {
    "run.seed": 0,
    "reward.batch_size": 1,
    "ppo.rollout_batch_size": 1,
    "ppo.rloo_k": 2,
    "ppo.rollout_chunk": 1,
    "ppo.ppo_epochs": 1,
    "ppo.minibatch_size": 1,
    "ppo.learning_rate": 0,
    "ppo.clip_range": 0,
    "ppo.kl_coef": 0,
    "ppo.entropy_coef": 0,
    "ppo.max_grad_norm": 0,
    "ppo.steps": 1,
    "evaluation.interval": 1,
    "evaluation.images": 2,
    "evaluation.batch": 1,
    "evaluation.patience": 0,
    "evaluation.warn_after": 1,
    "logging.log_interval": 1,
    "logging.save_interval": 1,
}
ABOVE_ZERO = (
    "ppo.dirichlet_concentration",
    "ppo.max_log_change",
    "ppo.scale_std",
    "ppo.policy_std",
    "ppo.kl_target",
    "ppo.anchor.kl",
    "ppo.anchor.latents",
    "logging.save_minutes",
)
UNUSED = {  # published keys that are accepted, and why they do nothing here
    "reward.multi.imagereward.med_config": "ImageReward's layout is known",
    **dict.fromkeys(
        ("reward.cache_dir", "reward.multi.imagereward.cache_dir", "reward.multi.clip.cache_dir"),
        "files of the hub are where HF_HUB_CACHE in the environment points",
    ),
}
HIGHEST: dict[str, float] = {"run.seed": 2**31, "ppo.max_log_change": 20, "ppo.dirichlet_concentration": 1e8}


def check(config: RDPOConfig) -> None:
    """Refuse values out of range and batches that do not divide, in one line that names the key."""
    ppo = config.ppo
    check_choices(
        [
            ("model.backend", config.model.backend, (None, *or_code(config.model.backend, NAMES))),
            ("model.guidance_type", config.model.guidance_type, (None, "cfg")),
            ("model.schedule_type", config.model.schedule_type, (None, *SCHEDULES)),
            ("reward.type", config.reward.type, or_code(config.reward.type, TRAINABLE)),
            *[("evaluation.rewards", name, or_code(name, REWARDS)) for name in config.evaluation.rewards],
            ("ppo.policy", ppo.policy, ("table", "mlp", "gaussian")),
            ("ppo.estimator", ppo.estimator, ("ppo", "backprop")),
            ("ppo.group_noise", ppo.group_noise, ("shared", "independent")),
            ("ppo.baseline", ppo.baseline, ("prompt", "mixed")),
        ]
    )
    check_ranges(config, LOWEST, HIGHEST, ABOVE_ZERO)
    if ppo.rollout_batch_size % ppo.rloo_k:
        raise ConfigError(
            f"ppo.rollout_batch_size is {ppo.rollout_batch_size}, expected a multiple of ppo.rloo_k"
            f" ({ppo.rloo_k})"
        )
    if ppo.minibatch_size > ppo.rollout_batch_size:
        raise ConfigError(
            f"ppo.minibatch_size is {ppo.minibatch_size}, expected at most ppo.rollout_batch_size"
            f" ({ppo.rollout_batch_size})"
        )
    if not ppo.decode_rgb:
        raise ConfigError("ppo.decode_rgb is False; rewards score images, never latents: leave it out")
    if ppo.anchor.kl is not None and ppo.anchor.latents is not None:
        raise ConfigError("ppo.anchor has kl and latents, expected one bound: leave the other out")
    select_by = config.evaluation.select_by
    if select_by not in (None, config.reward.type, *config.evaluation.rewards):
        raise ConfigError(
            f"evaluation.select_by is {select_by!r}, expected one of evaluation.rewards"
            f" ({', '.join(config.evaluation.rewards) or 'none is set'}) or reward.type"
        )
    trained = {config.reward.type}
    if config.reward.type == "multi":
        trained |= {name for name, weight in config.reward.multi.weights.items() if weight > 0}
    if both := trained & set(config.evaluation.rewards):
        raise ConfigError(
            f"evaluation.rewards holds {min(both)!r}, which is trained on; it is always measured"
        )


def config_notes(config: RDPOConfig) -> list[str]:
    """Notes on keys that a configuration sets and that do nothing here."""
    notes = [f"{key} is not used: {why}" for key, why in UNUSED.items() if value_at(config, key) is not None]
    if config.model.resolution is not None and config.model.backend == "ldm":
        notes.append(
            f"model.resolution {config.model.resolution} is not used: ldm has the model's own, else"
            " model.backend_options.resolution"
        )
    return notes
