"""What the drop-ins need of a predictor: its compiled tableau as plain data, and what it was made for."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from solvers import (
    NoiseSchedule,
    Predictor,
    PredictorError,
    compile_tableau,
    discrete,
    dynamic_shift,
    flowmatch,
    load_predictor,
    resolve_predictor_path,
    schedule_nodes,
)
from solvers.predictor.spec import tokens_of
from solvers.tableau import Tableau

SHIFT_KEYS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
CONFIG_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    *SHIFT_KEYS,
)
TABLE_FORMAT = "epd-table/1"  # as integrations/k_diffusion/sample_epd.py reads it
FLOW_FAMILIES, NOISE_FAMILIES = ("sd3", "flux", "chroma", "sana", "aura_flow", "lumina2"), ("ldm", "sdxl")
FLOW_SIGMA_MIN = 0.001  # the last level of diffusers' flow-matching grid, before it is shifted


def load(path: str | Path) -> tuple[Path, Predictor]:
    """The predictor that a file, a run folder or a name under exps means, and its file."""
    file = resolve_predictor_path(str(path))
    return file, load_predictor(file)


def as_data(predictor: Predictor, nodes: Tensor) -> dict[str, Any]:
    """A predictor compiled on its nodes as lists of numbers, which JSON keeps exactly.

    `nodes` are the noise levels between steps, `starts` the stage at which a run may begin at each of them
    but the last: an EPD table's own nodes; of a whole tableau the first alone (-1: none).
    """
    tableau, starts = (
        compile_tableau(predictor.solver(), nodes),
        predictor.kind.starts(predictor.table, predictor.spec),
    )
    sigmas, stages, output, levels = _in_level_order(tableau)
    between = nodes.tolist()
    if starts is None:
        inner = [sigmas[level[0]].item() for level in levels[1:]]
        between, starts = [between[0], *inner, between[-1]], [0, *[-1] * len(inner)]
    lists = {"sigmas": sigmas.tolist(), "stages": stages.tolist(), "output": output.tolist()}
    return lists | {"levels": levels, "nodes": between, "starts": starts}


def _in_level_order(tableau: Tableau) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """sigmas, stages, output and levels with stages numbered in the order of their levels."""
    order = [s for level in tableau.levels for s in level]
    columns = [0, *(1 + s for s in order)]
    levels, first = [], 0
    for level in tableau.levels:
        levels.append(list(range(first, first + len(level))))
        first += len(level)
    return tableau.sigmas[order], tableau.stages[order][:, columns], tableau.output[columns], levels


def table_data(path: str | Path, config: Mapping | None = None) -> dict[str, Any]:
    """The JSON content of a table for k-diffusion and ComfyUI; `config` is a scheduler's, for its nodes."""
    file, predictor = load(path)
    nodes = predictor.nodes() if config is None else resolve_nodes(predictor, config, file)
    data = as_data(predictor, nodes)
    return {"format": TABLE_FORMAT} | data | {"made_for": _made_for(predictor, data)}


def scheduler_options(paths: Sequence[str | Path], config: Mapping | None) -> dict[str, Any]:
    """The arguments of an EPDScheduler that holds some predictors, for a scheduler configuration."""
    if not paths:
        raise PredictorError("no predictor is given: expected a .pkl file, a run folder or a name under exps")
    config = dict(config or {})
    options = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    tables: dict[str, dict] = {}
    made_for: dict[str, dict] = {}
    shifts: set[float] = set()
    for file, predictor in map(load, paths):
        flow = is_flow(predictor, config, file)
        if not flow and not config:
            raise PredictorError(
                f"{file}: made for a model with a noise schedule, which a table does not record; give"
                " config=pipe.scheduler.config (its betas and prediction type)"
            )
        nodes = resolve_nodes(predictor, config, file)
        data = as_data(predictor, nodes)
        steps = str(len(data["sigmas"]))
        if steps in tables:
            raise PredictorError(
                f"{file}: a second table of {steps} network calls; give tables of different numbers of calls"
            )
        tables[steps], made_for[steps] = data, _made_for(predictor, data)
        shifts |= {_mu_of(nodes)} if predictor.spec.family == "flux" else set()
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if flow else {}
    same_shift = max(shifts, default=0.0) - min(shifts, default=0.0) < 1e-3
    return options | {
        "tables": tables,
        "made_for": made_for,
        "mu": min(shifts) if shifts and same_shift else None,
    }


def is_flow(predictor: Predictor, config: Mapping, file: Path) -> bool:
    """Whether the model is flow matching, by the scheduler configuration and the predictor alike."""
    family = predictor.spec.family
    by_file = True if family in FLOW_FAMILIES else False if family in NOISE_FAMILIES else None
    by_config = (
        ("beta_start" not in config or config.get("prediction_type") == "flow_prediction") if config else None
    )
    if by_file is None and by_config is None:
        raise PredictorError(f"{file}: records no backbone; give config=pipe.scheduler.config")
    if by_file is not None and by_config is not None and by_file != by_config:
        kinds = {True: "a flow-matching model", False: "a model with a noise schedule (betas)"}
        raise PredictorError(
            f"{file}: made for {kinds[by_file]}, but the scheduler's config is that of {kinds[by_config]}"
        )
    if config.get("rescale_betas_zero_snr"):
        raise PredictorError(
            "scheduler config: rescale_betas_zero_snr is true, so the noise level is infinite; expected false"
        )
    return by_config if by_file is None else by_file


def resolve_nodes(predictor: Predictor, config: Mapping, file: Path) -> Tensor:
    """The nodes [num_steps] that a predictor records, or those of its schedule for this configuration."""
    if predictor.sigmas is not None:
        return predictor.sigmas
    spec, count = predictor.spec, predictor.kind.num_nodes(predictor.table)
    if count is None:
        raise PredictorError(f"{file}: a {predictor.kind.name} that does not hold its nodes")
    if spec.schedule_type == "flowmatch":
        return _flow_nodes(predictor, config, count)
    try:
        if not is_flow(predictor, config, file):
            schedule = NoiseSchedule(_alphas_cumprod(config))
            if spec.schedule_type in (None, "discrete"):
                return discrete(count, schedule)
            return predictor.nodes(spec.sigma_min or schedule.sigma_min, spec.sigma_max or schedule.sigma_max)
        return schedule_nodes(
            spec.schedule_type or "none", count, spec.sigma_min, spec.sigma_max, spec.schedule_rho
        )
    except (ValueError, TypeError) as error:
        raise PredictorError(
            f"{file}: its nodes cannot be made from schedule {spec.schedule_type!r}: {error}"
        ) from None


def _flow_nodes(predictor: Predictor, config: Mapping, count: int) -> Tensor:
    spec = predictor.spec
    if predictor.spec.family == "flux" or spec.flowmatch_mu is not None:
        return flowmatch(
            count, mu=spec.flowmatch_mu if spec.flowmatch_mu is not None else _mu_for(predictor, config)
        )
    return flowmatch(count, shift=spec.flowmatch_shift or config.get("shift", 3.0))


def _mu_for(predictor: Predictor, config: Mapping) -> float:
    """FLUX's dynamic shift at a predictor's resolution, whose tokens have 16 pixels a side."""
    tokens = tokens_of(predictor.spec.backend_config.get("resolution"))
    ends = {key: config[key] for key in SHIFT_KEYS if config.get(key) is not None}
    return dynamic_shift(tokens, **ends)


def _mu_of(nodes: Tensor) -> float:
    """The dynamic shift of flow-matching nodes, from the last of them."""
    last = nodes[-1].item()
    return math.log(last / (1 - last) * (1 / FLOW_SIGMA_MIN - 1))


def _alphas_cumprod(config: Mapping) -> Tensor:
    from .diffusers.epd_scheduler import EPDScheduler

    return EPDScheduler(**{k: config[k] for k in CONFIG_KEYS if config.get(k) is not None}).alphas_cumprod


def _made_for(predictor: Predictor, data: dict) -> dict[str, Any]:
    """What a user must know of a table; what is not recorded is left out."""
    spec, provenance = predictor.spec, predictor.provenance
    entries = {
        "backend": spec.backend,
        "base_model": spec.backend_config.get("model_name_or_path"),
        "guidance": spec.guidance_rate,
        "resolution": spec.backend_config.get("resolution"),
        "schedule": spec.schedule_type,
        "depth": len(data["levels"]),
        "calls": len(data["sigmas"]),
        "kind": provenance.get("kind"),
        "heldout_rmse": provenance.get("heldout_rmse"),
        "teacher": provenance.get("teacher"),
    }
    return {key: value for key, value in entries.items() if value is not None}


def scheduler_config(model: Path) -> dict[str, Any]:
    """The scheduler configuration of a diffusers pipeline folder."""
    return read_json(model / "scheduler" / "scheduler_config.json", "a diffusers pipeline folder")


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """The content of a JSON file that belongs to a folder of some kind; its absence: PredictorError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
        raise PredictorError(f"{path}: {reason}; expected {kind}, as save_pretrained writes it") from None
    if not isinstance(content, dict):
        raise PredictorError(f"{path}: expected a JSON object, as in {kind}")
    return content
