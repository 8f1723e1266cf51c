"""HPSv2 (Wu et al. 2023, arXiv 2306.09341): CLIP ViT-H/14 in open_clip's layout, tuned on human choices."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import CosineReward, RewardError
from .files import find_file, load_weights, read_checkpoint
from .pixels import Pixels

VERSIONS = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSReward(CosineReward):
    """Cosine of HPSv2's image and text embeddings (Wu et al. 2023, arXiv 2306.09341); images are resized as
    floats, as hpsv2 does.

    Args:
        device: where the model is.
        weights_path: the published file of `version`, {'state_dict': ...}.
        version: "v2.0" or "v2.1".
        model_name: the layout of the file in open_clip.
        amp: run the towers in float16 on CUDA.

    Raises:
        RewardError: a file of another version or layout, or no open_clip.
    """

    name = "hps"

    def __init__(
        self,
        device: torch.device | str,
        weights_path: str | None = None,
        version: str = "v2.1",
        model_name: str = "ViT-H-14",
        amp: bool = False,
    ):
        path = weights_of(weights_path, version)
        require_open_clip()
        import open_clip

        if model_name not in open_clip.list_models():
            raise RewardError(
                f"reward 'hps': unknown model_name {model_name!r}, expected one of open_clip's models, such"
                " as ViT-H-14"
            )
        with torch.random.fork_rng(devices=[]):  # its random weights, replaced below, draw no numbers here
            model = open_clip.create_model(model_name, pretrained=None, output_dict=False)
        checkpoint = read_checkpoint("hps", path)
        if "state_dict" not in checkpoint:
            raise RewardError(
                f"reward 'hps': {path} has no 'state_dict'; give the published {VERSIONS[version]}"
            )
        load_weights("hps", path, model, checkpoint["state_dict"])
        super().__init__(device, Pixels(side=model.visual.image_size[0], clamp=False))
        self.model = model.requires_grad_(False).eval().to(self.device)
        self.tokenizer = open_clip.get_tokenizer(model_name)
        self.amp = amp and self.device.type == "cuda"
        self.version, self.files, self.options = version, [path], {"model_name": model_name, "amp": self.amp}

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> list[str]:
        weights_of(options["weights_path"], options["version"])
        require_open_clip()
        return []

    def encode_images(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            return self.model.encode_image(pixels)

    def encode_text(self, prompt: str) -> Tensor:
        with self.autocast():
            return self.model.encode_text(self.tokenizer([prompt]).to(self.device))

    def autocast(self) -> AbstractContextManager:
        """float16 on CUDA with `amp`, else no change."""
        return torch.autocast(self.device.type, torch.float16, enabled=self.amp)


def weights_of(path: str | None, version: str) -> Path:
    """The weight file of a version; an unknown version, or a file known to hold another: RewardError."""
    if version not in VERSIONS:
        raise RewardError(f"reward 'hps': unknown version {version!r}, expected one of {', '.join(VERSIONS)}")
    for other, file in VERSIONS.items():
        if path is not None and other != version and Path(path).name == file:
            raise RewardError(
                f"reward 'hps': {path!r} holds {other}, but version is {version!r}; set version: {other}, or"
                f" name {VERSIONS[version]}"
            )
    return find_file("hps", path, VERSIONS[version], "xswu/HPSv2")


def require_open_clip() -> None:
    """No open_clip: RewardError."""
    if find_spec("open_clip") is None:
        raise RewardError(
            "reward 'hps': open_clip is not installed; run \"pip install 'epd-solver[rewards]'\""
        )
