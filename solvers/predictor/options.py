"""Options of a backbone as the published code records or accepts them, brought to where they belong here:
once, in this module.
"""

from typing import Any

SECRETS = ("token", "api_key", "apikey", "access_key", "authorization", "password", "secret")  # ends of names
LIFTED = (
    "sigma_min",
    "sigma_max",
    "flowmatch_mu",
    "flowmatch_shift",
)  # of the schedule: they belong to the spec
DERIVED = ("latent_resolution",)  # follows from the resolution
MACHINE = (
    "compile",
    "offload",
    "enable_model_cpu_offload",
)  # how a machine runs a backbone, never what a table was made for
# options that a published predictor may carry into a backbone here; the backbones check their values
RECORDED = (
    "model_name_or_path",
    "revision",
    "variant",
    "resolution",
    "torch_dtype",
    "use_safetensors",
    "pipeline_kwargs",
    "negative_prompt",
    "max_sequence_length",
)
SD3_SHIFT = 3.0  # of Stable Diffusion 3 Medium's scheduler, whatever a published file records


def split_schedule_options(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options under the names used here, and the schedule's settings among them: (options, spec values).

    `model_id` is `model_name_or_path`, which wins where both are there; sigma_min, sigma_max, flowmatch_mu
    and flowmatch_shift belong to the spec; latent_resolution follows from the resolution.
    """
    options = {k: v for k, v in config.items() if k not in ("model_id", *LIFTED, *DERIVED)}
    if config.get("model_id") is not None and options.get("model_name_or_path") is None:
        options["model_name_or_path"] = config["model_id"]
    return options, {k: config[k] for k in LIFTED if config.get(k) is not None}


def map_published(values: dict[str, Any], img_resolution: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The spec values of a published predictor as they hold here, and notes on what was left out.

    The published samplers ignore what is recorded of the schedule for flow matching, but for FLUX's mu, and
    the resolution of Stable Diffusion 1.5, whose own is 512.
    """
    values = dict(values)
    if values.get("dataset_name") == "ms_coco":
        values.setdefault("backend", "ldm")  # files from before the key existed
    backend, config = values.get("backend"), values.get("backend_config", {})
    if backend not in ("ldm", "sd3", "flux"):
        no_guidance = (
            {"guidance_rate": 1.0} if values.get("dataset_name") and not values.get("guidance_rate") else {}
        )
        return values | no_guidance, ()
    if not isinstance(config, dict):
        return values, ()  # refused with the other values of a wrong type
    options, lifted = split_schedule_options(config)
    unknown = sorted(
        str(k) for k in options if k not in (*RECORDED, *MACHINE) and not str(k).lower().endswith(SECRETS)
    )
    options = {k: v for k, v in options.items() if k in RECORDED and v is not None}
    if backend == "ldm":
        options.pop("resolution", None)
    elif "resolution" not in options and isinstance(img_resolution, int):
        options["resolution"] = img_resolution
    values = lifted | values | {"backend_config": options}
    notes = [f"backend_config.{', '.join(unknown)}: no such option here, left out"] if unknown else []
    if backend == "sd3":
        for name, holds in (("flowmatch_mu", None), ("flowmatch_shift", SD3_SHIFT)):
            if values.get(name) not in (None, holds):
                notes.append(
                    f"{name} {values.pop(name)!r}: recorded, but never applied by the code that wrote it;"
                    " left out"
                )
    return values, tuple(notes)
