"""The rate that follows from the constant. Where the direction is averaged, so is the constant.

An average of gradients is bounded by the same average of their bounds (Yedida, Saha & Prashanth,
"LipschitzLR", 2020).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.transforms.lipschitz_rate.constants import Constants

# Adam's own ε. Its denominator has it, so the bound on the denominator has it too.
_EPSILON = 1e-8


class Averages(NamedTuple):
    """The moving averages of the constants: float32 scalars."""

    average: jax.Array  # K with momentum, K₁ for Adam; else 0
    square_average: jax.Array  # K₂ for Adam; else 0


@dataclasses.dataclass(frozen=True)
class GradientRate:
    """The rate for the gradient itself: η = 1/L."""

    wants_squares = False

    def advance(self, averages: Averages, known: Constants) -> Averages:
        """Return the averages after an update: nothing is averaged."""
        del known
        return averages

    def rate(self, averages: Averages, known: Constants, count: jax.Array) -> jax.Array:
        """Return η; infinite before a measurement."""
        del averages, count
        return 1 / known.lipschitz_constant


@dataclasses.dataclass(frozen=True)
class MomentumRate:
    """The rate for an average of gradients v ← βv + (1−β)g: η = 1/K with K ← βK + (1−β)L."""

    decay: float
    wants_squares = False

    def advance(self, averages: Averages, known: Constants) -> Averages:
        """Return the averages after an update."""
        average = _advance(averages.average, known.lipschitz_constant, self.decay)
        return averages._replace(average=average)

    def rate(self, averages: Averages, known: Constants, count: jax.Array) -> jax.Array:
        """Return η; infinite before a measurement."""
        del known, count
        return 1 / averages.average


@dataclasses.dataclass(frozen=True)
class AdamRate:
    """The rate for Adam's direction: η = (√K₂ + ε) / K₁, both averages without their bias."""

    first_decay: float
    second_decay: float
    wants_squares = True

    def advance(self, averages: Averages, known: Constants) -> Averages:
        """Return the averages after an update."""
        first, second = averages
        return Averages(
            _advance(first, known.lipschitz_constant, self.first_decay),
            _advance(second, known.square_constant, self.second_decay),
        )

    def rate(self, averages: Averages, known: Constants, count: jax.Array) -> jax.Array:
        """Return η; not finite before a measurement."""
        del known
        steps = count.astype(jnp.float32) + 1
        # Adam corrects its averages for their bias towards zero, so the constants' are corrected
        # too.
        first, second = (
            1 - jnp.float32(decay) ** steps for decay in (self.first_decay, self.second_decay)
        )
        root = jnp.sqrt(averages.square_average / second) + _EPSILON
        return root / (averages.average / first)


RateOfConstant = GradientRate | MomentumRate | AdamRate


def rate_for(averages: tuple[float, ...]) -> RateOfConstant:
    """Return the rate for a direction that is averaged with these decays.

    Raises:
      ValueError: more than two decays, or one out of range.
    """
    if len(averages) > 2:
        raise ValueError(f"averages must be (), (β,) or (β₁, β₂), got {averages!r}.")
    for decay in averages:
        check_interval("averages", decay, 0.0, 1.0, open_high=True)
    kinds = (GradientRate, MomentumRate, AdamRate)
    return kinds[len(averages)](*averages)


def _advance(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """Return the moving average after one more value, float32."""
    # Without a bias correction: before a measurement both are 0, and the average stays there.
    return (decay * old + (1 - decay) * new).astype(jnp.float32)
