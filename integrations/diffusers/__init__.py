"""Learned tables in diffusers' pipelines: the scheduler, and K points in one call of a network."""

from .epd_scheduler import EPDScheduler

__all__ = ["EPDScheduler"]
