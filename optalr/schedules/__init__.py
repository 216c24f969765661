"""Decays of the learning rate that optax lacks, and profiles of exponentially decaying flows."""

from optalr.schedules.decays import (
    exponential_rate_decay,
    halving,
    inverse_decay,
    triangular,
)
from optalr.schedules.profiles import (
    exponential_profile,
    flow_schedule,
    linear_profile,
    power_profile,
)

__all__ = [  # noqa: RUF022  (sorted by theme)
    # Decays.
    "exponential_rate_decay",
    "halving",
    "inverse_decay",
    "triangular",
    # Flows that follow a decay profile.
    "flow_schedule",
    "exponential_profile",
    "linear_profile",
    "power_profile",
]
