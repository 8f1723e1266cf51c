"""Image-text scorers, used by RDPO and by evaluation: load_reward makes them."""

import torch

from .base import Reward, RewardError

NAMES = ("digits", "judge")
TRAINABLE = ("digits",)  # the judge is for measuring only

__all__ = ["NAMES", "TRAINABLE", "Reward", "RewardError", "load_reward"]


def load_reward(name: str, config: dict, device: torch.device | str) -> Reward:
    """The reward of a name: digits (the embedded image-text model), judge (the digits classifier, never trained on).

    `config` may hold weights_path, a folder to load instead of the embedded one. An unknown name or key, or missing
    weights: RewardError.
    """
    unknown = set(config) - {"weights_path"}
    if unknown:
        raise RewardError(f"reward {name!r}: unknown option {min(unknown)!r}, expected weights_path")
    device = torch.device(device)
    if name == "digits":
        from backends.digits import REWARD_FOLDER

        from .clip_model import ClipReward

        folder = str(config.get("weights_path") or REWARD_FOLDER)
        return ClipReward("digits", folder, folder, device, scaled=False)
    if name == "judge":
        if config:
            raise RewardError("reward 'judge' has no options: leave out weights_path")
        from .digits_judge import JudgeReward

        return JudgeReward(device)
    raise RewardError(f"reward {name!r}: expected one of {', '.join(NAMES)}")
