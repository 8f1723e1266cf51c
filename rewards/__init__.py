"""Image-text scorers, used by RDPO and by evaluation: load_reward makes them."""

from .base import Reward, RewardError
from .registry import NAMES, TRAINABLE, check_reward, load_reward

__all__ = ["NAMES", "TRAINABLE", "Reward", "RewardError", "check_reward", "load_reward"]
