"""Learning-rate schedules that optax does not have, as functions of the step count.

For others (constant, cosine, polynomial, piecewise, warm-up, one-cycle, …) use optax. All schedules
here return float32 scalars and may be called inside ``jit``. The step count is the number of
updates so far, 0 at the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optalr.arguments import check_choice, check_count, check_interval


def inverse_decay(init_value: float, rate: float) -> optax.Schedule:
    """Decay the learning rate in inverse proportion to time: ``η = η₀ / (1 + k t)``.

    Choose it where steps should shrink for ever and yet never stop. Their sum diverges, and the sum
    of their squares does not.

    Args:
      init_value: η₀, the rate of the first step, at least 0.
      rate: k, per step, at least 0; after 1/k steps the rate is halved.

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is negative.

    Cost: a few scalar operations per step.

    Examples:
      >>> import optalr
      >>> schedule = optalr.schedules.inverse_decay(1.0, rate=0.5)
      >>> [float(schedule(step)) for step in (0, 2, 6)]
      [1.0, 0.5, 0.25]

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019.
    """
    check_interval("init_value", init_value, 0.0)
    check_interval("rate", rate, 0.0)
    return lambda count: init_value / (1 + rate * _float(count))


def exponential_rate_decay(init_value: float, rate: float) -> optax.Schedule:
    """Decay the learning rate exponentially, by a rate: ``η = η₀ exp(−k t)``.

    Choose it to write the decay as a rate. ``optax.exponential_decay`` writes the same curve as a
    factor and a number of steps, and adds a staircase and an end value.

    Args:
      init_value: η₀, the rate of the first step, at least 0.
      rate: k, per step, at least 0; the rate falls to 1/e in 1/k steps.

    Returns:
      A schedule.

    Raises:
      ValueError: an argument is negative.

    Cost: a few scalar operations per step.

    Examples:
      >>> import math, optalr
      >>> schedule = optalr.schedules.exponential_rate_decay(2.0, rate=0.1)
      >>> abs(float(schedule(10)) - 2 * math.exp(-1)) < 1e-6
      True

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019.
    """
    check_interval("init_value", init_value, 0.0)
    check_interval("rate", rate, 0.0)
    return lambda count: init_value * jnp.exp(-rate * _float(count))


def halving(init_value: float, every: int, *, min_value: float = 0.0) -> optax.Schedule:
    """Halve the learning rate at regular intervals: ``η = max(η₀ 2^−⌊t/T⌋, η_min)``.

    Choose it for a staircase that needs no list of boundaries.

    Args:
      init_value: η₀, the rate of the first ``every`` steps, at least 0.
      every: T, steps between halvings, at least 1.
      min_value: η_min, the rate at which the staircase ends, at least 0.

    Returns:
      A schedule.

    Raises:
      TypeError: ``every`` is not a whole number.
      ValueError: an argument lies outside its range.

    Cost: a few scalar operations per step.

    Examples:
      >>> import optalr
      >>> schedule = optalr.schedules.halving(1.0, every=10)
      >>> [float(schedule(step)) for step in (0, 9, 10, 29, 30)]
      [1.0, 1.0, 0.5, 0.25, 0.125]

    Reference: Raschka, "Common Optimization Algorithms", STAT 479 lecture 12, 2019.
    """
    check_interval("init_value", init_value, 0.0)
    check_count("every", every, 1)
    check_interval("min_value", min_value, 0.0)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        halvings = _float(jnp.asarray(count) // every)
        return jnp.maximum(init_value * jnp.exp2(-halvings), min_value)

    return schedule


def triangular(
    min_value: float,
    max_value: float,
    half_cycle: int,
    *,
    variant: str | Callable[[jax.Array], jax.Array] = "triangular",
    gamma: float | None = None,
) -> optax.Schedule:
    """Raise and lower the learning rate in straight lines, again and again.

    Choose it to avoid a search for one best rate: a range test gives the two bounds. With ``S`` the
    half cycle, ``c = ⌊1 + t/(2S)⌋`` the cycle and ``x = |t/S − 2c + 1|``,

        η = η_min + (η_max − η_min) · max(0, 1 − x) · a,

    where the amplitude ``a`` is 1 for ``"triangular"``, ``2^−(c−1)`` for ``"triangular2"``
    and ``γ^t`` for ``"exp_range"``.

    Args:
      min_value: η_min, the rate at the start of each cycle, at least 0.
      max_value: η_max, the rate in the middle of the first cycle, at least ``min_value``.
      half_cycle: S, steps from the lowest rate to the highest, at least 1. The paper suggests 2 to
        10 epochs.
      variant: ``"triangular"``, ``"triangular2"``, ``"exp_range"``, or a function that maps the
        cycle (1, 2, …; float32) to its amplitude.
      gamma: γ in (0, 1], for ``"exp_range"`` only.

    Returns:
      A schedule.

    Raises:
      TypeError: ``half_cycle`` is not a whole number.
      ValueError: an argument lies outside its range; or ``gamma`` is missing, or given to another
        variant.

    Cost: a few scalar operations per step.

    Examples:
      >>> import optalr
      >>> schedule = optalr.schedules.triangular(0.0, 1.0, 4, variant="triangular2")
      >>> [float(schedule(step)) for step in (0, 2, 4, 6, 8, 12)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]

    Reference: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.2.
    """
    check_interval("min_value", min_value, 0.0)
    check_interval("max_value", max_value, float(min_value), remedy="It is the upper bound.")
    check_count("half_cycle", half_cycle, 1)
    if not callable(variant):
        check_choice("variant", variant, tuple(_AMPLITUDES))
    if (gamma is not None) != (variant == "exp_range"):
        raise ValueError(f"gamma goes with variant='exp_range' and only with it, got {gamma!r}.")
    if gamma is not None:
        check_interval("gamma", gamma, 0.0, 1.0, open_low=True)
    amplitude = _amplitude_of(variant)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        # Whole numbers for as long as possible, so the cycle is exact however long the run is.
        cycle = _float(1 + count // (2 * half_cycle))
        height = 1 - jnp.abs(_float(count % (2 * half_cycle)) / half_cycle - 1)
        return min_value + (max_value - min_value) * height * amplitude(cycle, count, gamma)

    return schedule


def _amplitude_of(variant: str | Callable[[jax.Array], Any]) -> Callable[..., jax.Array]:
    """Return the amplitude as a function of the cycle, the step count and gamma."""
    if callable(variant):
        return lambda cycle, count, gamma: jnp.asarray(variant(cycle), jnp.float32)
    return _AMPLITUDES[variant]


_AMPLITUDES: dict[str, Callable[..., jax.Array]] = {
    "triangular": lambda cycle, count, gamma: jnp.ones(()),
    "triangular2": lambda cycle, count, gamma: jnp.exp2(1 - cycle),
    "exp_range": lambda cycle, count, gamma: gamma ** _float(count),
}


def _float(count: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(count).astype(jnp.float32)
