"""RDPO configuration: the published keys with their names, new ones with a meaning each."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


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
    """The weighted sum of reward.type: multi."""

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
    """The reward that is trained on: one of ours, or my_module:NAME."""
    weights_path: str | None = None
    """Its weights (HPSv2's for multi), where they are not embedded or on the hub."""
    batch_size: int = 2
    """Images scored at a time."""
    enable_amp: bool = True
    """HPSv2's towers in float16 on CUDA; the cosine is always in float32."""
    hps_version: str = "v2.1"
    cache_dir: str | None = None
    multi: MultiConfig = field(default_factory=MultiConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """More options of the reward, by name."""

    def load_options(self) -> dict[str, Any]:
        """The options that load_reward gets."""
        hps = {"weights_path": self.weights_path, "version": self.hps_version, "amp": self.enable_amp}
        if self.type == "hps":
            return hps | self.options
        if self.type != "multi":
            weights = {} if self.weights_path is None else {"weights_path": self.weights_path}
            return {**weights, **self.options}
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
class AnchorConfig:
    """A bound on how far the policy may move from its start table, held after every step; at most one."""

    kl: float | None = None
    """KL(policy || base) in nats."""
    latents: float | None = None
    """RMS change of the final latents by the mean table, over their RMS, on 16 training prompts."""


@dataclass
class PPOConfig:
    rollout_batch_size: int = 4
    """Images a step, over all ranks."""
    rloo_k: int = 2
    """Siblings a group: tables tried on the same prompt."""
    rollout_chunk: int = 64
    """Images sampled at a time on a rank; rounding depends on it, and so not on the number of ranks."""
    ppo_epochs: int = 1
    minibatch_size: int = 2
    """Images of one update, over all ranks."""
    learning_rate: float | None = 5e-5
    """null: 0.01 from a learned table, 0.03 from equal points, 0.05 for gaussian."""
    clip_range: float = 0.2
    kl_coef: float = 0.01
    """Weight of KL(policy || base)."""
    kl_target: float | None = None
    """Adapt kl_coef so that KL(policy || base) stays near this many nats (PPO, section 4); null leaves it."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    frozen_levels: list[int] = field(default_factory=list)
    """Levels, from 0, that keep the start's numbers: intervals of a table; stages of a tableau, with its
    output row where the last level is kept.
    """
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
    """Residual of the Dirichlet policy: table (one number a concentration) or mlp (published); or gaussian,
    over a learned tableau's own coordinates (an EPD start is compiled to a tableau).
    """
    policy_std: float | None = None
    """Standard deviation of gaussian in those coordinates; null measures once how wide draws must be to
    change the final latents by 10 % RMS.
    """
    estimator: str = "ppo"
    """ppo, which needs rewards alone, or backprop: the gradient of the reward through the frozen network, for
    rewards that have one (a rival; about three times the work, and the memory of a network's activations).
    """
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
    select_by: str | None = None
    """The reward by whose gain the best policy is chosen: one of evaluation.rewards; null is the trained one.
    """
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
