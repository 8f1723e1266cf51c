"""Lumina-Image 2.0: any diffusers folder or hub id of Lumina2Pipeline."""

from .. import quiet  # noqa: F401  isort: skip
from diffusers import Lumina2Pipeline  # isort: skip
from .adapter import FlowBackend, FlowCall, flow_family


class Lumina2(FlowBackend):
    """A transformer whose time runs from noise at 0 to the image at 1, and whose output points to the image
    (Qin et al. 2025, arXiv 2503.21758); guidance keeps the norm of the conditional output.
    """

    CALL = FlowCall(
        Lumina2Pipeline,
        "a Lumina-Image 2.0 pipeline",
        tokens=256,
        positive={"encoder_hidden_states": 0, "encoder_attention_mask": 1},
        negative={"encoder_hidden_states": 2, "encoder_attention_mask": 3},
        data_at_one=True,
        sign=-1.0,
        renormalised=True,
    )
    default_guidance = 4.0


FAMILY = flow_family(Lumina2, "lumina2")
