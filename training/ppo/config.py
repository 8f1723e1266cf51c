"""What an RDPO run can be told: the published keys with their names, new ones with a meaning each, checked
before anything loads.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

import backends
from backends import SCHEDULES
from rewards import NAMES as REWARDS
from rewards import TRAINABLE

from ..config import ConfigError, check_choices, check_ranges, value_at


@dataclass
class RunConfig:
    output_root: str = "exps"
    run_name: str = "rl_run"
    seed: int = 0


@dataclass
class DataConfig:
    predictor_snapshot: str = MISSING
    """The table to start from: a file, a run folder, a folder of tables (its distilled one, else its start),
    or a name under exps.
    """
    prompt_csv: str | None = None
    """Text, CSV or COCO file of training prompts. By default the digits' own; for ms_coco
    src/prompts/MS-COCO_val2014_30k_captions.csv where it is there; else src/prompts/train.txt.
    """


@dataclass
class ModelConfig:
    """The backbone and what the table is used with; null takes what the start table was made for, another
    value is an error.
    """

    dataset_name: str | None = None
    guidance_type: str | None = None
    guidance_rate: float | None = None
    schedule_type: str | None = None
    schedule_rho: float | None = None
    num_steps: int | None = None
    num_points: int | None = None
    backend: str | None = None
    resolution: int | None = None
    """Pixels a side for sd3 and flux; ldm uses the model's own, as published (or
    backend_options.resolution).
    """
    backend_options: dict[str, Any] = field(default_factory=dict)
    sigma_min: float | None = None
    sigma_max: float | None = None
    flowmatch_mu: float | None = None
    flowmatch_shift: float | None = None


@dataclass
class PickScoreConfig:
    model: str | None = None
    processor: str | None = None


@dataclass
class ImageRewardConfig:
    checkpoint: str | None = None
    med_config: str | None = None
    cache_dir: str | None = None


@dataclass
class ClipConfig:
    cache_dir: str | None = None


@dataclass
class AestheticConfig:
    predictor_path: str | None = None
    clip_path: str | None = None


@dataclass
class MultiConfig:
    """What reward.type: multi sums."""

    weights: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("hps", "pickscore", "imagereward", "clip", "aesthetic"), 1.0)
    )
    """Heads and their weights; 0 leaves one out, unloaded."""
    normalise: str = "published"
    """Each head to a common scale first: published ranges, or standard: (score - mean) / std."""
    constants: dict[str, list[float]] = field(default_factory=dict)
    """A head's own [lowest, highest] or [mean, std]."""
    pickscore: PickScoreConfig = field(default_factory=PickScoreConfig)
    imagereward: ImageRewardConfig = field(default_factory=ImageRewardConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)


@dataclass
class RewardConfig:
    type: str = "hps"
    """The reward that is trained on."""
    weights_path: str | None = None
    """Its weights (HPSv2's for multi), where they are not embedded or found by name."""
    batch_size: int = 2
    """Images scored at a time."""
    enable_amp: bool = True
    """HPSv2's towers in float16 on CUDA; the cosine is always in float32."""
    hps_version: str = "v2.1"
    cache_dir: str | None = None
    multi: MultiConfig = field(default_factory=MultiConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """More options of the reward, by name."""

    def chosen(self) -> dict[str, Any]:
        """The options that load_reward gets."""
        hps = {"weights_path": self.weights_path, "version": self.hps_version, "amp": self.enable_amp}
        if self.type == "hps":
            return hps | self.options
        if self.type != "multi":
            return {"weights_path": self.weights_path, **self.options}
        multi = self.multi
        configs = {
            "hps": hps,
            "pickscore": {"weights_path": multi.pickscore.model, "processor": multi.pickscore.processor},
            "imagereward": {"weights_path": multi.imagereward.checkpoint},
            "aesthetic": {
                "weights_path": multi.aesthetic.predictor_path,
                "clip_path": multi.aesthetic.clip_path,
            },
        }
        return {
            "weights": multi.weights,
            "normalise": multi.normalise,
            "constants": multi.constants,
            "configs": configs,
            **self.options,
        }


@dataclass
class PPOConfig:
    rollout_batch_size: int = 4
    """Images a step, over all ranks."""
    rloo_k: int = 2
    """Siblings a group: tables tried on the same prompt."""
    rollout_chunk: int = 64
    """Images sampled at a time on a rank; it decides rounding, so that a result does not depend on the number
    of ranks.
    """
    ppo_epochs: int = 1
    minibatch_size: int = 2
    """Images of one update, over all ranks."""
    learning_rate: float | None = 5e-5
    """null: 0.01 from a learned table, 0.03 from equal points."""
    clip_range: float = 0.2
    kl_coef: float = 0.01
    """Weight of KL(policy || base)."""
    kl_target: float | None = None
    """Adapt kl_coef so that KL(policy || base) stays near this many nats (PPO, section 4); null leaves it."""
    entropy_coef: float = 0.0
    max_grad_norm: float | None = None
    decode_rgb: bool = True
    """Rewards see images, never latents: must be true."""
    steps: int = 10
    dirichlet_concentration: float | None = 200.0
    """Sum of the concentrations of each simplex at the start: higher explores less. null: 1000 from a learned
    table, whose neighbourhood is worth a close look; 100 from equal points, where the good tables are far
    away.
    """
    max_log_change: float = 3.0
    """Largest change of a log concentration: keeps the policy from a point mass and from the corners."""
    scale_std: float = 0.05
    train_scale_dir: bool | None = None
    """Learn the direction scales; null where the start table has them."""
    train_scale_time: bool | None = None
    policy: str = "table"
    """Residual of the policy: table (one number a concentration) or mlp (published)."""
    group_noise: str = "shared"
    """Initial noise of siblings: shared, so that only their tables differ, or independent (published)."""
    baseline: str = "prompt"
    """Leave-one-out within the group (prompt), or the published estimator (mixed)."""


@dataclass
class EvaluationConfig:
    """The mean table against the start table, paired, on prompts and seeds that are never trained on."""

    interval: int = 10
    images: int = 256
    prompt_csv: str | None = None
    """Held-out prompts; by default the last of data.prompt_csv, a fifth at most, which are then not trained
    on.
    """
    rewards: list[str] = field(default_factory=list)
    """Rewards that are measured, never trained on; judge is for digits."""
    batch: int = 64
    patience: int = 0
    """Stop after so many evaluations without a better one; 0 for never."""
    warn_after: int = 50
    """Steps after which an interval that still holds 0 gives a warning."""


@dataclass
class LoggingConfig:
    log_interval: int = 1
    save_interval: int = 5
    """Steps between checkpoints."""
    save_minutes: float | None = 10.0
    """Minutes after which a checkpoint is written between these too; null for never."""


@dataclass
class RDPOConfig:
    """An RDPO run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


LOWEST = {
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
    "ppo.kl_target",
    "logging.save_minutes",
)
WITHOUT_MEANING = {  # published keys that are accepted, and why they do nothing here
    "reward.multi.imagereward.med_config": "ImageReward's layout is known",
    **dict.fromkeys(
        ("reward.cache_dir", "reward.multi.imagereward.cache_dir", "reward.multi.clip.cache_dir"),
        "HF_HUB_CACHE in the environment says where files of the hub are",
    ),
}
HIGHEST = {"run.seed": 2**31, "ppo.max_log_change": 20, "ppo.dirichlet_concentration": 1e8}


def check(config: RDPOConfig) -> None:
    """Refuse values out of range and batches that do not divide, in one line that names the key."""
    ppo = config.ppo
    check_choices(
        [
            ("model.backend", config.model.backend, (None, *backends.NAMES)),
            ("model.guidance_type", config.model.guidance_type, (None, "cfg")),
            ("model.schedule_type", config.model.schedule_type, (None, *SCHEDULES)),
            ("reward.type", config.reward.type, TRAINABLE),
            *[("evaluation.rewards", name, REWARDS) for name in config.evaluation.rewards],
            ("ppo.policy", ppo.policy, ("table", "mlp")),
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
    trained = {config.reward.type}
    if config.reward.type == "multi":
        trained |= {name for name, weight in config.reward.multi.weights.items() if weight > 0}
    if both := trained & set(config.evaluation.rewards):
        raise ConfigError(
            f"evaluation.rewards holds {min(both)!r}, which is trained on; it is always measured"
        )


def config_notes(config: RDPOConfig) -> list[str]:
    """What is said of keys that a configuration sets and that do nothing here."""
    said = [
        f"{key} is not used: {why}"
        for key, why in WITHOUT_MEANING.items()
        if value_at(config, key) is not None
    ]
    if config.model.resolution is not None and config.model.backend == "ldm":
        said.append(
            f"model.resolution {config.model.resolution} is not used: ldm has the model's own, else"
            " model.backend_options.resolution"
        )
    return said
