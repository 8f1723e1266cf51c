"""Learned tables in diffusers' pipelines: the scheduler, and K points in one call of a network."""

from .epd_scheduler import EPDScheduler
from .parallel_points import disable_parallel_points, enable_parallel_points

__all__ = ["EPDScheduler", "disable_parallel_points", "enable_parallel_points"]
