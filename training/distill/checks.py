"""What a distillation configuration may hold, checked before anything loads."""

from backends import DTYPES, NAMES, SCHEDULES
from common.prompts import MAX_SEEDS, SEEDS
from solvers import BASELINES

from ..config import ConfigError, check_choices, check_ranges, or_code
from ..log import REPORT_TO
from .config import DistillConfig
from .students import STUDENTS


def check(config: DistillConfig) -> None:
    """Refuse values out of range and combinations that make no sense, in one line that names the key."""
    check_choices(
        [
            ("backend.name", config.backend.name, or_code(config.backend.name, NAMES)),
            ("backend.dtype", config.backend.dtype, ("auto", *DTYPES)),
            ("nodes.schedule", config.nodes.schedule, (None, *SCHEDULES)),
            ("student.kind", config.student.kind, tuple(STUDENTS)),
            ("teacher.solver", config.teacher.solver, tuple(BASELINES)),
            ("teacher.schedule", config.teacher.schedule, (None, *SCHEDULES)),
            ("logging.report_to", config.logging.report_to, REPORT_TO),
            ("bank.dtype", config.bank.dtype, ("float32", "float16")),
            *[("evaluation.baselines", name, tuple(BASELINES)) for name in config.evaluation.baselines],
            *[("evaluation.schedules", name, SCHEDULES) for name in config.evaluation.schedules],
        ]
    )
    check_ranges(config, LOWEST, HIGHEST, above_zero=("train.checkpoint_minutes",))
    _check_student(config)
    _check_pairs(config)
    _check_loss(config)


LOWEST: dict[str, float] = {  # key: smallest value that makes sense
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
    "student.moment_damping": 0,
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

HIGHEST: dict[str, float] = {
    **dict.fromkeys(("train.seed", "bank.first_seed", "bank.heldout_seed"), SEEDS - 1),
    **dict.fromkeys(("bank.pairs", "bank.heldout_pairs"), MAX_SEEDS),
}


def _check_student(config: DistillConfig) -> None:
    student = config.student
    for name, half in (("scale_dir", student.scale_dir), ("scale_time", student.scale_time)):
        if not 0 <= half < 1:
            raise ConfigError(f"student.{name} is {half}, expected a half-range from 0 to below 1")
    if student.max_order > 4:
        raise ConfigError(f"student.max_order is {student.max_order}, expected 1 to 4")
    STUDENTS[student.kind].check(config)


def _check_pairs(config: DistillConfig) -> None:
    bank = config.bank
    seeds = (
        range(bank.first_seed, bank.first_seed + bank.pairs),
        range(bank.heldout_seed, bank.heldout_seed + bank.heldout_pairs),
    )
    for name, part in zip(("first", "heldout"), seeds, strict=True):
        if part.stop > SEEDS:
            raise ConfigError(
                f"bank.{name}_seed is {part.start}: with {len(part)} pairs its seeds reach {part.stop - 1},"
                f" expected at most {SEEDS - 1}, after which noise repeats itself"
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
    if config.needs_states and (student.learn_sigmas or not STUDENTS[student.kind].fixed_nodes):
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
