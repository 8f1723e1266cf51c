"""The hub id of each family's published model, and what its pipeline class is called, importable without the
libraries that run it.
"""

import os

MODELS = {
    "ldm": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
    "chroma": "lodestones/Chroma1-HD",
    "sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "aura_flow": "fal/AuraFlow-v0.3",
    "lumina2": "Alpha-VLLM/Lumina-Image-2.0",
}
PIPELINES = {
    "StableDiffusionPipeline": "ldm",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "ChromaPipeline": "chroma",
    "SanaPipeline": "sana",
    "AuraFlowPipeline": "aura_flow",
    "Lumina2Pipeline": "lumina2",
}
"""The family of a pipeline folder, by the class that its model_index.json names."""


SINGLE_FILES = (".safetensors", ".ckpt")


def flux_model() -> str:
    """FLUX_MODEL_PATH where it is set, else the hub id of FLUX.1-dev."""
    return os.environ.get("FLUX_MODEL_PATH") or MODELS["flux"]
