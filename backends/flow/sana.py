"""Sana: any diffusers folder or hub id of SanaPipeline."""

import inspect
from typing import Any

from .. import quiet  # noqa: F401  isort: skip
from diffusers import SanaPipeline  # isort: skip
from .adapter import FlowBackend, FlowCall, flow_family

INSTRUCTION = "complex_human_instruction"


class Sana(FlowBackend):
    """A linear-attention transformer on latents of 32 pixels a side (Xie et al. 2024, arXiv 2410.10629).

    Prompts follow the pipeline's own instruction to the language model that encodes them; negative ones do
    not.
    """

    CALL = FlowCall(
        SanaPipeline,
        "a Sana pipeline",
        tokens=300,
        positive={"encoder_hidden_states": 0, "encoder_attention_mask": 1},
        negative={"encoder_hidden_states": 2, "encoder_attention_mask": 3},
        time_scale=1000.0,
    )
    default_guidance = 4.5

    def prompt_options(self) -> dict[str, Any]:
        return {INSTRUCTION: inspect.signature(SanaPipeline.__call__).parameters[INSTRUCTION].default}


FAMILY = flow_family(Sana, "sana")
