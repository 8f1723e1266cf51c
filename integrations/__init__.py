"""One learned table inside other tools: diffusers, k-diffusion and ComfyUI."""
