"""The embedded default: a tiny Stable Diffusion of real handwritten digits, with its judge; see build.py."""

from pathlib import Path

FOLDER = Path(__file__).parent / "sd"
FOLDERS = {"ldm": FOLDER, "sd3": FOLDER.parent / "sd3", "flux": FOLDER.parent / "flux"}
OPTIONS = {"ldm": {}, "sd3": {"max_sequence_length": 4}, "flux": {"max_sequence_length": 16}}  # as trained
REWARD_FOLDER = Path(__file__).parent / "reward"
