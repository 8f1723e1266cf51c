"""AuraFlow: any diffusers folder or hub id of AuraFlowPipeline."""

import math

from ..base import BackendError

from .. import quiet  # noqa: F401  isort: skip
from diffusers import AuraFlowPipeline  # isort: skip
from .adapter import FlowBackend, FlowCall, flow_family

PIXELS = 1024


class AuraFlow(FlowBackend):
    """A transformer whose text embeddings are zero where the prompt has ended; it takes no mask."""

    CALL = FlowCall(
        AuraFlowPipeline,
        "an AuraFlow pipeline",
        tokens=256,
        positive={"encoder_hidden_states": 0},
        negative={"encoder_hidden_states": 2},
    )
    default_guidance = 3.5

    def own_pixels(self) -> int:
        return min(PIXELS, self.pipe.vae_scale_factor * self.network.config.patch_size * self._positions)

    @property
    def _positions(self) -> int:
        return math.isqrt(self.network.config.pos_embed_max_size)

    def check_patches(self, patches: tuple[int, int]) -> None:
        if max(patches) > self._positions:
            largest = self._positions * self.network.config.patch_size * self.pipe.vae_scale_factor
            raise BackendError(
                f"resolution {self.config['resolution']}: expected at most {largest} pixels a side, for which"
                " this model has positions"
            )


FAMILY = flow_family(AuraFlow, "aura_flow")
