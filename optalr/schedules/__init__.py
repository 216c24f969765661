"""Decays of the learning rate that optax lacks, and profiles of exponentially decaying flows."""

from optalr.schedules.decays import (
    exponential_rate_decay,
    halving,
    inverse_decay,
    triangular,
)

__all__ = ["exponential_rate_decay", "halving", "inverse_decay", "triangular"]
