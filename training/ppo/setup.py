"""From a configuration to all that an RDPO run needs: start table, spec, prompts, backbone, rewards,
policy.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from backends import Backend, check_backbone_known, check_backend
from backends.parallel import ParallelEvaluator
from common.distributed import Ranks
from common.prompts import default_prompts
from rewards import check_reward, load_reward
from solvers import Predictor, Spec, Tableau, load_predictor, resolve_predictor_path
from solvers.predictor.options import split_schedule_options

from ..config import ConfigError, without_secrets
from ..prompts import digits_prompts, split_prompts
from ..run_folder import RunFolder
from .config import PPOConfig, RDPOConfig
from .policy import ResidualPolicy, make_policy
from .rollout import Scorer
from .trainer import Trainer

DISTILL_CONFIGS = Path(__file__).parents[1] / "distill" / "cfgs"
EVALUATION_SEED = 3_000_000
START_KINDS = ("distilled", "start", "best")  # of a folder of tables, what RDPO starts from


def load_start(config: RDPOConfig) -> tuple[Predictor, str]:
    """The start table and what to call it; one that does not say its backend, or a tableau: ConfigError."""
    path = resolve_predictor_path(config.data.predictor_snapshot, kinds=START_KINDS)
    predictor = load_predictor(path)
    if isinstance(predictor.table, Tableau):
        raise ConfigError(
            f"data.predictor_snapshot {path} holds a tableau; RDPO learns tables: choose one distilled with"
            " student.kind: table"
        )
    check_backbone_known(predictor.spec, path)
    return predictor, f"{path.name} sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"


def merge_spec(config: RDPOConfig, predictor: Predictor) -> Spec:
    """The spec of the run: the configuration over the start table's; a contradiction names both."""
    source, model = config.data.predictor_snapshot, config.model
    table = predictor.table
    recorded = replace(predictor.spec, num_steps=table.num_intervals + 1, num_points=table.num_points)
    options, schedule = split_schedule_options(model.backend_options)
    asked = {name: vars(model).get(name) for name in vars(recorded)}
    asked |= {name: value for name, value in schedule.items() if asked[name] is None}
    if model.resolution is not None and (model.backend or recorded.backend) != "ldm":
        options["resolution"] = model.resolution
    labels = {name: f"model.{name}" for name in vars(recorded)}
    labels |= {"backend_config.resolution": "model.resolution", "backend_config.family": "model.family"}
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
    else narrow (README, RDPO).
    """
    concentration, rate = (100.0, 0.03) if from_equal else (1000.0, 0.01)
    if ppo.dirichlet_concentration is None:
        ppo.dirichlet_concentration = concentration
    if ppo.learning_rate is None:
        ppo.learning_rate = rate


def start_notes(config: RDPOConfig, name: str) -> list[str]:
    """What is said of the table that a run starts from; `name` is the configuration's."""
    predictor, parent = load_start(config)
    said = [f"{config.data.predictor_snapshot}: {text}" for text in predictor.notes]
    if predictor.is_start:
        command = (
            f"./launch.sh distill {name}"
            if (DISTILL_CONFIGS / f"{name}.yaml").is_file()
            else "./launch.sh distill NAME"
        )
        said.append(
            f"nothing was learned yet in the start table {config.data.predictor_snapshot} ({parent}); distil"
            f" first: {command}"
        )
    return said


def prompts_of(
    config: RDPOConfig, backend_name: str, dataset_name: str | None = None
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; no prompt is in both."""
    own = None
    if backend_name == "digits":
        train, heldout = digits_prompts(10**4, config.evaluation.images)
        own = list(dict.fromkeys(train)), heldout
    chosen = config.data.prompt_csv or (None if own else str(default_prompts(dataset_name)))
    files = ("data.prompt_csv", chosen), ("evaluation.prompt_csv", config.evaluation.prompt_csv)
    return split_prompts(*files, config.evaluation.images, own)


def policy_of(config: RDPOConfig, predictor: Predictor) -> ResidualPolicy:
    """The policy around the start table."""
    ppo, table = config.ppo, predictor.table
    learned = []
    for name in ("scale_dir", "scale_time"):
        asked = getattr(ppo, f"train_{name}")
        learned.append(getattr(table, name) is not None if asked is None else asked)
    scales = (learned[0], learned[1])
    return make_policy(
        ppo.policy,
        table,
        ppo.dirichlet_concentration,
        ppo.scale_std,
        scales,
        ppo.max_log_change,
        config.run.seed,
    )


def prepare(config: RDPOConfig, backend: Backend, ranks: Ranks, run: RunFolder) -> Trainer:
    """Everything that a run needs."""
    predictor, parent = load_start(config)
    spec = merge_spec(config, predictor)
    nodes = backend.sigmas(spec) if predictor.sigmas is None else predictor.sigmas
    guidance = backend.default_guidance if spec.guidance_rate is None else spec.guidance_rate
    train, heldout = prompts_of(config, backend.name, spec.dataset_name)
    heldout = heldout[: config.evaluation.images]
    backend.fingerprint()  # with offload it is kept before the text encoders are freed
    backend.precompute_embeddings(list(dict.fromkeys([*train, *heldout])), guidance)
    trained = load_reward(config.reward.type, config.reward.chosen(), ranks.device)
    measured = [trained, *(load_reward(name, {}, ranks.device) for name in config.evaluation.rewards)]
    scorer = Scorer(backend, nodes, guidance, spec.afs, spec.max_order, [trained], config.reward.batch_size)
    count = config.evaluation.images
    provenance = {
        "kind": "rdpo",
        "parent": parent,
        "reward": trained.protocol(),
        "seed": config.run.seed,
        "ppo": dict(vars(config.ppo)),
    }
    return Trainer(
        config,
        ranks,
        run,
        policy_of(config, predictor),
        scorer,
        replace(scorer, rewards=measured, points=ParallelEvaluator()),
        train,
        [heldout[i % len(heldout)] for i in range(count)],
        list(range(EVALUATION_SEED, EVALUATION_SEED + count)),
        replace(spec, guidance_rate=float(guidance), backend_config=without_secrets(spec.backend_config)),
        provenance | {"learned_sigmas": predictor.provenance.get("learned_sigmas", False)},
    )


def check_rewards(config: RDPOConfig) -> list[str]:
    """Refuse rewards that could not be loaded, before anything is; what will be fetched, in words."""
    return [
        *check_reward(config.reward.type, config.reward.chosen()),
        *(n for r in config.evaluation.rewards for n in check_reward(r, {})),
    ]


def calls_of(config: RDPOConfig, predictor: Predictor) -> str:
    """What a step costs, in words."""
    cost, ppo = predictor.cost(), config.ppo
    groups = ppo.rollout_batch_size // ppo.rloo_k
    spec = merge_spec(config, predictor)
    twice = (
        ", twice with guidance"
        if spec.guidance_rate != 1 and check_backend(spec)[0].backend.cfg_doubles_rows
        else ""
    )
    return (
        f"a step: {ppo.rollout_batch_size} images ({groups} groups of {ppo.rloo_k}), {cost.evaluations}"
        f" evaluations each ({ppo.rollout_batch_size * cost.evaluations} network rows{twice}), serial depth"
        f" {cost.depth}; {ppo.steps} steps; an evaluation every {config.evaluation.interval} steps:"
        f" {config.evaluation.images} images"
    )
