"""The embedded default: a tiny Stable Diffusion of real handwritten digits, with its judge; see build.py."""

from pathlib import Path

FOLDER = Path(__file__).parent / "sd"
REWARD_FOLDER = Path(__file__).parent / "reward"
