"""What a distillation run can be told: typed sections with a meaning for every key, checked before any model
loads.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from backends import DTYPES, NAMES, SCHEDULES
from solvers import BASELINES, Spec
from solvers.predictor.options import split_schedule_options

from ..config import ConfigError, check_choices, check_ranges


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
    """Table: take the first gradient from the start itself."""
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
    resolution: float = 0.1
    """Tableau: differences between denoised states below this share of the start's error are moved by less;
    higher is steadier.
    """
    learn_sigmas: bool = False
    """Learn the inner nodes of a table, or the noise levels of a tableau's stages, as well."""


@dataclass
class TeacherConfig:
    """The fine solver to imitate."""

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
    """Pairs in one forward and backward pass: what memory allows, and what decides rounding."""
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


def check(config: DistillConfig) -> None:
    """Refuse values out of range and combinations that make no sense, in one line that names the key."""
    check_choices(
        [
            ("backend.name", config.backend.name, NAMES),
            ("backend.dtype", config.backend.dtype, ("auto", *DTYPES)),
            ("nodes.schedule", config.nodes.schedule, (None, *SCHEDULES)),
            ("student.kind", config.student.kind, ("table", "tableau")),
            ("teacher.solver", config.teacher.solver, tuple(BASELINES)),
            ("teacher.schedule", config.teacher.schedule, (None, *SCHEDULES)),
            ("bank.dtype", config.bank.dtype, ("float32", "float16")),
            *[("evaluation.baselines", name, tuple(BASELINES)) for name in config.evaluation.baselines],
            *[("evaluation.schedules", name, SCHEDULES) for name in config.evaluation.schedules],
        ]
    )
    highest = dict.fromkeys(("train.seed", "bank.first_seed", "bank.heldout_seed"), 2**40)
    check_ranges(config, LOWEST, highest, above_zero=("train.checkpoint_minutes",))
    _check_student(config)
    _check_loss(config)


LOWEST = {  # key: smallest value that makes sense
    "guidance_scale": 0,
    "nodes.num_steps": 2,
    "nodes.rho": 1e-3,
    "nodes.sigma_min": 1e-9,
    "nodes.sigma_max": 1e-9,
    "nodes.flowmatch_shift": 1e-3,
    "nodes.flowmatch_mu": -20,
    "student.num_points": 1,
    "student.max_order": 1,
    "student.depth": 2,
    "student.stride": 1,
    "student.first_points": 1,
    "student.resolution": 0,
    "teacher.intervals": 1,
    "teacher.inner": 0,
    "teacher.check": 0,
    "bank.pairs": 1,
    "bank.heldout_pairs": 2,
    "bank.first_seed": 0,
    "bank.heldout_seed": 0,
    "bank.shard_size": 1,
    **{f"loss.{name}": 0 for name in ("stepwise", "trajectory", "final", "decoded", "feature", "start")},
    "train.steps": 1,
    "train.batch": 1,
    "train.chunk": 1,
    "train.lr": 0,
    "train.lr_floor": 0,
    "train.clip": 0,
    "train.seed": 0,
    "train.checkpoint_interval": 1,
    "train.patience": 0,
    "evaluation.interval": 1,
    "evaluation.batch": 1,
    "evaluation.tuning_pairs": 1,
}


def _check_student(config: DistillConfig) -> None:
    student, bank = config.student, config.bank
    for name, half in (("scale_dir", student.scale_dir), ("scale_time", student.scale_time)):
        if not 0 <= half < 1:
            raise ConfigError(f"student.{name} is {half}, expected a half-range from 0 to below 1")
    if student.max_order > 4:
        raise ConfigError(f"student.max_order is {student.max_order}, expected 1 to 4")
    if student.kind == "table" and student.start == "baseline":
        raise ConfigError(
            'student.start is "baseline", which a tableau can start from; a table starts from equal, low or a'
            " predictor"
        )
    if student.kind == "tableau" and student.start == "baseline" and student.depth is None:
        raise ConfigError(
            "student.depth is not set: a tableau that starts from a baseline needs its serial depth"
        )
    if student.kind == "tableau" and student.start in ("equal", "low"):
        raise ConfigError(
            f'student.start is {student.start!r}, but a tableau starts from "baseline" or a predictor'
        )
    seeds = (
        range(bank.first_seed, bank.first_seed + bank.pairs),
        range(bank.heldout_seed, bank.heldout_seed + bank.heldout_pairs),
    )
    if max(s.start for s in seeds) < min(s.stop for s in seeds):
        raise ConfigError(
            f"bank.first_seed {bank.first_seed} and bank.heldout_seed {bank.heldout_seed}: training and"
            " held-out seeds overlap"
        )
    if config.evaluation.tuning_pairs > bank.pairs:
        raise ConfigError(
            f"evaluation.tuning_pairs is {config.evaluation.tuning_pairs}, expected at most bank.pairs"
            f" ({bank.pairs})"
        )


def _check_loss(config: DistillConfig) -> None:
    loss, student = config.loss, config.student
    if not any((loss.stepwise, loss.trajectory, loss.final, loss.decoded, loss.feature)):
        raise ConfigError("loss: all weights are 0; expected one above 0")
    if (loss.stepwise or loss.trajectory) and (student.kind == "tableau" or student.learn_sigmas):
        raise ConfigError(
            "loss.stepwise and loss.trajectory need fixed nodes: set them to 0 for a tableau or"
            " student.learn_sigmas"
        )
    kept, intervals = config.teacher.intervals, config.nodes.num_steps - 1
    if config.needs_states and kept is not None and kept % intervals:
        raise ConfigError(
            f"teacher.intervals is {kept}, expected a multiple of the student's {intervals} intervals"
            " (nodes.num_steps - 1)"
        )
    if config.needs_states and config.teacher.schedule not in (None, config.nodes.schedule):
        raise ConfigError(
            "teacher.schedule differs from nodes.schedule, but loss.stepwise and loss.trajectory need states"
            " at the same nodes"
        )
    if loss.feature and not loss.feature_network:
        raise ConfigError("loss.feature_network is not set, but loss.feature is above 0")
    if loss.feature_network == "judge" and config.backend.name != "digits":
        raise ConfigError(
            'loss.feature_network is "judge", which knows digits only, but backend.name is'
            f" {config.backend.name!r}"
        )
    if loss.start and student.kind == "table":
        raise ConfigError("loss.start holds a tableau near its start; set it to 0 for a table")
