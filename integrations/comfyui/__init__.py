"""ComfyUI custom node: learned EPD-Solver tables as SAMPLER and SIGMAS."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
