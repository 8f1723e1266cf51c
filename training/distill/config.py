"""Distillation configuration: typed sections with a meaning for every key."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from solvers import BASELINES, Spec
from solvers.predictor.options import split_schedule_options

from ..config import renamed


@dataclass
class BackendConfig:
    """The frozen backbone."""

    name: str = MISSING
    """Backbone family, as sample.py --backend."""
    config: dict[str, Any] = field(default_factory=dict)
    """Its options: model_name_or_path, resolution, negative_prompt, ..."""
    dtype: str = "auto"
    """Number type of its networks: auto, float32, float16 or bfloat16."""
    block_checkpointing: bool = False
    """Also recompute inside a network call, block by block: for networks of which one call alone is too
    large.
    """


@dataclass
class NodesConfig:
    """The nodes between which the student steps; for a tableau only the two ends matter."""

    num_steps: int = 4
    """Number of nodes, one more than intervals."""
    schedule: str | None = None
    """polynomial, logsnr, time_uniform, discrete or flowmatch; the backbone's own by default."""
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    flowmatch_shift: float | None = None
    flowmatch_mu: float | None = None


@dataclass
class StudentConfig:
    """What is learned."""

    kind: str = "table"
    """table: an EPD or EPD-Plugin table; tableau: all coefficients of a tableau."""
    num_points: int = 2
    """K, parallel points an interval; for a tableau that is widened, stages a level."""
    max_order: int = 1
    """Table: 1 is EPD-Solver, above 1 EPD-Plugin with that order of extrapolation."""
    afs: bool = False
    """Table: take the first velocity from the start itself (analytical first step)."""
    scale_dir: float = 0.0
    """Table: half-range of the direction scales, 0 for none."""
    scale_time: float = 0.0
    """Table: half-range of the time scales, 0 for none."""
    start: str = "equal"
    """equal (equally spaced points), low (points near the interval's start), a predictor, or for a tableau
    "baseline".
    """
    depth: int | None = None
    """Tableau started from "baseline": serial depth."""
    widen: bool = False
    """Tableau started from a predictor: give it idle stages to learn, as one started from "baseline" has."""
    stride: int = 1
    """Widened tableau: every stride-th level after the first has K stages, the others one."""
    first_points: int = 1
    """Widened tableau: stages in the first level, which sees the start itself."""
    moment_damping: float = renamed("resolution", 0.1)
    """Tableau: differences between denoised states below this share of the start's error are moved by less;
    higher is steadier.
    """
    learn_sigmas: bool = False
    """Learn the inner nodes of a table, or the noise levels of a tableau's stages, as well."""


@dataclass
class TeacherConfig:
    """The fine solver whose states are the targets."""

    solver: str = "dpm2"
    """A baseline's name."""
    schedule: str | None = None
    """Schedule of its nodes, where the loss does not need its states at the student's; by default the
    student's.
    """
    intervals: int | None = None
    """Intervals whose states are kept, by default the student's: one bank can then serve students of several
    sizes.
    """
    inner: int = 3
    """M, nodes inserted between two kept ones."""
    check: int = 32
    """Pairs on which the teacher is compared with one of twice as many intervals; 0 for none."""


@dataclass
class BankConfig:
    """Pairs of a prompt and a seed, and where their teacher states are kept."""

    folder: str = "banks"
    prompts: str | None = None
    """A text file (one a line), CSV or COCO file of prompts, or "digits". By default the digits' own for
    digits; for ms_coco src/prompts/MS-COCO_val2014_30k_captions.csv where it is there; else
    src/prompts/train.txt.
    """
    heldout_prompts: str | None = None
    """Prompts to measure with; by default the last of `prompts`, a fifth of them at most, which are then not
    trained on.
    """
    pairs: int = 512
    heldout_pairs: int = 128
    first_seed: int = 1_000_000
    """Seed of the first training pair; held-out pairs take seeds from `heldout_seed` on."""
    heldout_seed: int = 2_000_000
    shard_size: int = 64
    """Pairs in one file, and in one batch of the teacher."""
    dtype: str = "float32"
    """Number type of the states on disk: float32 or float16."""


@dataclass
class LossConfig:
    """Weights of the terms: root mean square errors of an image's state over the teacher's RMS at
    that node.
    """

    stepwise: float = 0.0
    """Every interval's state, the gradient stopped at each interval."""
    trajectory: float = 0.0
    """Every interval's state along the student's own trajectory, gradients through all intervals."""
    final: float = 1.0
    """The final state."""
    decoded: float = 0.0
    """The decoded image, in units of its range."""
    feature: float = 0.0
    """Features of `feature_network`, over their RMS."""
    feature_network: str | None = None
    """Folder or hub id of a vision network of transformers (such as CLIP or DINOv2), or "judge" on digits."""
    start: float = 0.0
    """Tableau: squared distance from the start."""


@dataclass
class TrainConfig:
    """Adam on a few dozen numbers."""

    steps: int = 300
    batch: int = 32
    """Pairs a step, over all ranks."""
    chunk: int = 32
    """Pairs in one forward and backward pass: what memory allows; rounding depends on it."""
    lr: float = 0.1
    """Peak learning rate; for a tableau in units of its start's error."""
    lr_floor: float = 0.02
    """The cosine ends at this share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Order of the pairs."""
    checkpointing: bool = False
    """Recompute each network call in the backward pass instead of keeping its activations."""
    parallel_points: bool = True
    """K points in one network call, as when sampling; off saves memory."""
    checkpoint_interval: int = 50
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = 10.0
    """Minutes after which a checkpoint is written between these too; null for never."""
    patience: int = 0
    """Stop after so many evaluations without a better table; 0 for never."""


@dataclass
class EvaluationConfig:
    """Held-out error to the teacher, for the student and for baselines of the same serial depth."""

    interval: int = 50
    batch: int = 64
    baselines: list[str] = field(default_factory=lambda: sorted(BASELINES))
    schedules: list[str] = field(default_factory=list)
    """Schedules to choose each baseline's from; empty for all that fit the backbone."""
    tuning_pairs: int = 64
    """Training pairs on which each baseline's schedule is chosen."""
    depths: list[int] = field(default_factory=list)
    """More serial depths at which the plot shows the baselines."""


@dataclass
class LoggingConfig:
    report_to: str = "tensorboard"
    """The viewer beside logs/metrics.jsonl: tensorboard, wandb (offline with WANDB_MODE=offline) or none."""


@dataclass
class DistillConfig:
    """A distillation run."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    guidance_scale: float = MISSING
    dataset_name: str | None = None
    nodes: NodesConfig = field(default_factory=NodesConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def needs_states(self) -> bool:
        """Whether the loss needs the teacher's states at the student's nodes, not only the last."""
        return bool(self.loss.stepwise or self.loss.trajectory)

    def spec(self, num_steps: int | None = None, schedule: str | None = None) -> Spec:
        """The backend and schedule part of a predictor's spec."""
        nodes = self.nodes
        options, of_schedule = split_schedule_options(self.backend.config)
        return Spec(
            dataset_name=self.dataset_name,
            backend=self.backend.name,
            backend_config=options,
            num_steps=num_steps or nodes.num_steps,
            guidance_type="cfg",
            guidance_rate=float(self.guidance_scale),
            schedule_type=schedule or nodes.schedule,
            schedule_rho=nodes.rho,
            sigma_min=of_schedule.get("sigma_min") if nodes.sigma_min is None else nodes.sigma_min,
            sigma_max=of_schedule.get("sigma_max") if nodes.sigma_max is None else nodes.sigma_max,
            flowmatch_shift=(
                of_schedule.get("flowmatch_shift") if nodes.flowmatch_shift is None else nodes.flowmatch_shift
            ),
            flowmatch_mu=(
                of_schedule.get("flowmatch_mu") if nodes.flowmatch_mu is None else nodes.flowmatch_mu
            ),
        )
