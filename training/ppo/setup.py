"""From a configuration to all that an RDPO run needs: start table, spec, prompts, backbone, rewards,
policy.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from backends import Backend, check_backend
from backends.parallel import ParallelEvaluator
from common.prompts import default_prompts
from rewards import check_reward, load_reward
from solvers import Predictor, SolverTable, Spec, UserError, resolve_predictor_path
from solvers.predictor.options import split_schedule_options

from ..config import ConfigError, without_secrets
from ..processes import Processes
from ..prompts import PromptFile, digits_prompts, split_prompts
from ..run_folder import RunFolder
from ..start import Start, load_start
from .backprop import BackpropTrainer
from .base import Policy
from .config import PPOConfig, RDPOConfig
from .policies import anchor_of, check_start, exported_spec, new_policy
from .rollout import HeldOut, Problem, Scorer
from .trainer import RDPOTrainer

DISTILL_CONFIGS = Path(__file__).parents[1] / "distill" / "cfgs"
EVALUATION_SEED = 3_000_000
ESTIMATORS = {"ppo": RDPOTrainer, "backprop": BackpropTrainer}  # by ppo.estimator
START_KINDS = ("distilled", "start", "best")  # of a folder of tables, what RDPO starts from


def find_start(config: RDPOConfig) -> Start:
    """The start table, loaded once for the run; a tableau, or one of an unknown backbone: an error."""
    start = load_start(resolve_predictor_path(config.data.predictor_snapshot, kinds=START_KINDS))
    check_start(config, start)
    return start


def merge_spec(config: RDPOConfig, start: Start) -> Spec:
    """The spec of the run: the configuration over the start table's; a contradiction names both."""
    source, model, table = start.path, config.model, start.predictor.table
    recorded = start.predictor.spec
    if isinstance(table, SolverTable):
        recorded = replace(recorded, num_steps=table.num_intervals + 1, num_points=table.num_points)
    options, schedule = split_schedule_options(model.backend_options)
    settings = {name: vars(model).get(name) for name in vars(recorded)}
    asked = settings | {name: value for name, value in schedule.items() if settings[name] is None}
    if model.resolution is not None and (model.backend or recorded.backend) != "ldm":
        options["resolution"] = model.resolution
    labels = {
        **{name: f"model.{name}" for name in vars(recorded)},
        "backend_config.resolution": "model.resolution",
        "backend_config.family": "model.family",
    }
    free = unused_settings(recorded.overridden(asked | {"backend_config": {}}))
    spec = recorded.merged(asked | {"backend_config": options}, source, labels, free)
    if spec.backend is None:
        raise ConfigError(f"model.backend is not set, and {source} does not record it")
    return spec


def unused_settings(spec: Spec) -> tuple[str, ...]:
    """Settings that may differ from the table's, since nothing that is computed depends on them."""
    if spec.schedule_type != "flowmatch":
        return ("dataset_name",)
    shift = () if spec.flowmatch_mu is None else ("flowmatch_shift",)
    return ("dataset_name", "sigma_min", "sigma_max", *shift)


def choose_exploration(ppo: PPOConfig, from_equal: bool) -> None:
    """Put numbers in place of a null concentration and learning rate: wide exploration from equal points,
    else narrow (docs/results.md).
    """
    concentration, rate = (100.0, 0.03) if from_equal else (1000.0, 0.01)
    if ppo.dirichlet_concentration is None:
        ppo.dirichlet_concentration = concentration
    if ppo.learning_rate is None:
        ppo.learning_rate = 0.05 if ppo.policy == "gaussian" else rate


def start_notes(start: Start, name: str) -> list[str]:
    """Notes on the table that a run starts from; `name` is the configuration's."""
    notes = [f"{start.path}: {text}" for text in start.predictor.notes]
    if start.predictor.is_start:
        known = (DISTILL_CONFIGS / f"{name}.yaml").is_file()
        notes.append(
            f"nothing was learned yet in the start table {start.path} ({start.parent}); distil first:"
            f" ./launch.sh distill {name if known else 'NAME'}"
        )
    return notes


def prompts_of(
    config: RDPOConfig, backend_name: str | None, dataset_name: str | None = None
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no prompt is in both."""
    own = None
    if backend_name == "digits":
        train, heldout = digits_prompts(10**4, config.evaluation.images)
        own = list(dict.fromkeys(train)), heldout
    path = config.data.prompt_csv or (None if own else str(default_prompts(dataset_name)))
    return split_prompts(
        PromptFile("data.prompt_csv", path),
        PromptFile("evaluation.prompt_csv", config.evaluation.prompt_csv),
        config.evaluation.images,
        own,
    )


def predictor_of(policy: Policy, state: dict, exported: dict, measured: dict) -> Predictor:
    """The mean table of a policy's state as a predictor; leaves the policy in that state.

    Args:
        policy: of the run.
        state: its state; the empty one of a run that was stopped before its first evaluation: UserError.
        exported: RDPOTrainer.exported, as in a checkpoint.
        measured: what the provenance records of this state.
    """
    if not state:
        raise UserError(
            "the run has no best policy yet: it was stopped before its first evaluation; go on with --resume"
        )
    policy.load_state_dict(state)
    with torch.no_grad():
        table = policy.mean()
    provenance = exported["provenance"] | measured
    return Predictor(table, Spec(**exported["spec"]), exported["nodes"], provenance)


def prepare(
    config: RDPOConfig, start: Start, backend: Backend, run: RunFolder, processes: Processes
) -> RDPOTrainer:
    """Everything that a run needs.

    Args:
        config: of the run.
        start: its start table.
        backend: the frozen backbone.
        run: where it writes.
        processes: its ranks.
    """
    predictor, device = start.predictor, processes.ranks.device
    spec, count = merge_spec(config, start), config.evaluation.images
    nodes = backend.sigmas(spec) if predictor.sigmas is None else predictor.sigmas
    guidance = backend.default_guidance if spec.guidance_rate is None else spec.guidance_rate
    train, heldout = prompts_of(config, backend.name, spec.dataset_name)
    heldout = heldout[:count]
    backend.fingerprint()  # with offload it is kept before the text encoders are freed
    backend.note_truncated([*train, *heldout])
    backend.precompute_embeddings(list(dict.fromkeys([*train, *heldout])), guidance)
    trained = load_reward(config.reward.type, config.reward.load_options(), device)
    measured = [trained, *(load_reward(name, {}, device) for name in config.evaluation.rewards)]
    scorer = Scorer(backend, nodes, guidance, spec.afs, spec.max_order, [trained], config.reward.batch_size)
    spec = replace(spec, guidance_rate=float(guidance), backend_config=without_secrets(spec.backend_config))
    problem = Problem(
        scorer,
        train,
        HeldOut(
            replace(scorer, rewards=measured, points=ParallelEvaluator()),
            [heldout[i % len(heldout)] for i in range(count)],
            list(range(EVALUATION_SEED, EVALUATION_SEED + count)),
            config.evaluation.batch,
        ),
        exported_spec(config, spec, nodes),
        {
            "kind": "rdpo",
            "parent": start.parent,
            "reward": trained.protocol(),
            "seed": config.run.seed,
            "ppo": {k: v for k, v in asdict(config.ppo).items() if k != "policy_std"},  # policy has it
            "learned_sigmas": predictor.provenance.get("learned_sigmas", False),
        },
        predictor.is_start,
        anchor_of(config, scorer, train, processes),
    )
    policy = new_policy(config, start, (scorer, train), processes)
    return ESTIMATORS[config.ppo.estimator](config, policy, problem, run, processes)


def check_rewards(config: RDPOConfig) -> list[str]:
    """Refuse rewards that could not be loaded, before anything is; what will be fetched, in words."""
    return [
        *check_reward(config.reward.type, config.reward.load_options()),
        *(n for r in config.evaluation.rewards for n in check_reward(r, {})),
    ]


def step_cost(config: RDPOConfig, spec: Spec, predictor: Predictor) -> str:
    """What a step costs, in words."""
    cost, ppo = predictor.cost(), config.ppo
    groups = ppo.rollout_batch_size // ppo.rloo_k
    doubled = spec.guidance_rate != 1 and check_backend(spec)[0].backend.cfg_doubles_rows
    twice = ", twice with guidance" if doubled else ""
    return (
        f"a step: {ppo.rollout_batch_size} images ({groups} groups of {ppo.rloo_k}), {cost.evaluations}"
        f" evaluations each ({ppo.rollout_batch_size * cost.evaluations} network rows{twice}), serial depth"
        f" {cost.depth}; {ppo.steps} steps; an evaluation every {config.evaluation.interval} steps:"
        f" {config.evaluation.images} images"
    )
