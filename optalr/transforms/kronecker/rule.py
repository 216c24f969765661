"""What an update goes by: the power, the damping, the moving average, and the clock."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.kronecker import split_damping
from optalr.linalg.structured import Structured

# How many measurements a refresh interval holds where signals_every is not given. At the default
# decay of 0.95 the average of some 20 batches then spans two intervals.
_MEASUREMENTS_PER_ROOT = 10
# An interval is at most the steps taken so far over this: roots age fast in early training.
_GROWTH = 2

Dampings = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class DampingForm:
    """Where a damping acts.

    Attributes:
      of_factors: function of both factors and λ that returns what is added to the eigenvalues of
        each, ``(*stack,)``.
      is_relative: whether λ counts in units of the mean eigenvalue.
    """

    of_factors: Callable[[Structured, Structured, jax.Array], Dampings]
    is_relative: bool = False


def _relative(rows: Structured, cols: Structured, damping: jax.Array) -> Dampings:
    """Return λ times the mean eigenvalue of each factor."""
    means = rows.mean(), cols.mean()
    alive = (means[0] > 0) & (means[1] > 0)
    # A layer that has seen nothing has no scale: its root is the identity.
    row, col = (jnp.where(alive, damping * mean, 1) for mean in means)
    return row, col


def _absolute(rows: Structured, cols: Structured, damping: jax.Array) -> Dampings:
    """Return λ for each factor: the paper's ``Λ + εI``."""
    return jnp.broadcast_to(damping, rows.stack), jnp.broadcast_to(damping, cols.stack)


DAMPING_FORMS: Mapping[str, DampingForm] = MappingProxyType(
    {
        "relative": DampingForm(_relative, is_relative=True),
        "absolute": DampingForm(_absolute),
        "balanced": DampingForm(split_damping),
    }
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How moments are averaged and what power of them is applied. Numbers may be traced.

    Attributes:
      power: p of the Kronecker product.
      share: s in ``F ≈ (B ⊗ A)^s``: 1 for captured moments, 1/2 for Shampoo's, whose factors make
        ``F ≈ (GᵀG ⊗ GGᵀ)^{1/2}``.
      decay: of the moving averages.
      damping: λ, float32.
      damping_form: where it acts.
    """

    power: Any
    share: float
    decay: Any
    damping: jax.Array
    damping_form: DampingForm

    @property
    def exponent(self) -> Any:
        """The power that each factor takes."""
        return self.power * self.share

    def dampings(self, rows: Structured, cols: Structured) -> Dampings:
        """Return what is added to the eigenvalues of each factor, ``(*stack,)``."""
        return self.damping_form.of_factors(rows, cols, self.damping.astype(rows.stored.dtype))

    def added(self, values: jax.Array, num_axes: int) -> jax.Array:
        """Return what damping adds to eigenvalues; their mean is taken over the last axes."""
        if not self.damping_form.is_relative:
            return self.damping
        axes = tuple(range(-num_axes, 0))
        return self.damping * jnp.mean(values, axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Clock:
    """When to measure and when to take roots. Numbers may be traced.

    Attributes:
      update_every: updates between two roots, once intervals have stopped growing.
      signals_every: updates between two measurements by then; None for a tenth of
        ``update_every``.
      decay: of the moving averages.
      warmup: samples per dimension that every factor must have seen before the first roots.
      min_batches: batches measured before the first roots.
    """

    update_every: Any
    signals_every: Any
    decay: Any
    warmup: float
    min_batches: int

    def measures(self, signal_age: jax.Array, count: jax.Array) -> jax.Array:
        """Return whether the update after ``count`` others measures."""
        longest = self.signals_every
        if longest is None:
            longest = jnp.asarray(self.update_every, jnp.int32) // _MEASUREMENTS_PER_ROOT
        spacing = self._interval(count) // _MEASUREMENTS_PER_ROOT
        steady = count // _GROWTH >= jnp.asarray(self.update_every, jnp.int32)
        # While intervals grow, each needs its measurements, whatever signals_every says.
        longest = jnp.asarray(longest, jnp.int32)
        spacing = jnp.where(steady, longest, jnp.minimum(spacing, longest))
        return signal_age >= jnp.maximum(spacing, 1)

    def refreshes(self, state: Any) -> jax.Array:
        """Return whether this update takes roots."""
        # A moving average never holds more than some 1/(1 − decay) batches. After twice that many,
        # waiting for more samples is in vain.
        longest_memory = 1 / (1 - jnp.asarray(self.decay, jnp.float32))
        seen = state.measurements.astype(jnp.float32)
        enough = (state.samples >= self.warmup) | (seen >= 2 * longest_memory)
        trusted = enough & (state.measurements >= self.min_batches)
        due = (state.num_refreshes == 0) | (state.root_age >= self._interval(state.count))
        return trusted & due

    def _interval(self, count: jax.Array) -> jax.Array:
        """Return the updates between roots: half the updates so far, at most ``update_every``."""
        return jnp.clip(count // _GROWTH, 1, jnp.asarray(self.update_every, jnp.int32))
