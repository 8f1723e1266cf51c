"""Learned tables as a sampler function with k-diffusion's conventions."""

from .sample_epd import LearnedTable, sample_epd

__all__ = ["LearnedTable", "sample_epd"]
