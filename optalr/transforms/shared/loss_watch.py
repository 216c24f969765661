"""A bound on the length of steps that begins once the loss has risen.

All rates that set themselves share it. Before the rise it leaves them alone: while a rule works, a
bound would only make another rule of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.transforms.shared.lengths import length


class LossWatch(NamedTuple):
    """What is remembered of the loss."""

    first_value: jax.Array  # () float32, the first loss that was finite; 0 before
    started: jax.Array  # () bool, whether there was one
    risen: jax.Array  # () bool, whether it ever rose by a share of its size, or was not finite


def check_bound(max_step: Any, max_rise: Any) -> None:
    """Raise unless ``max_step`` is None or positive, and ``max_rise`` not negative."""
    if max_step is not None:
        remedy = "None switches it off."
        check_interval("max_step", max_step, 0.0, open_low=True, remedy=remedy)
    check_interval("max_rise", max_rise, 0.0)


def start_watch() -> LossWatch:
    """Return the memory before the first step."""
    return LossWatch(jnp.zeros((), jnp.float32), jnp.zeros((), bool), jnp.zeros((), bool))


def watch_loss(watch: LossWatch, value: Any, max_rise: float) -> LossWatch:
    """Return the memory after a step whose loss is ``value``; None where it is not known."""
    if value is None:
        return watch
    value = jnp.asarray(value).astype(jnp.float32)
    # A loss that is not finite is nothing to compare with.
    begins = ~watch.started & jnp.isfinite(value)
    first = jnp.where(begins, value, watch.first_value)
    # By a share of its size, so that a loss below zero is watched like one above it.
    limit = first + (max_rise - 1) * jnp.abs(first)
    # Negated, so that a loss of NaN counts as risen: it compares as false with everything.
    risen = watch.risen | ~(value <= limit)
    return LossWatch(first, watch.started | begins, risen)


def bound_step(
    rate: jax.Array, direction: Any, *, max_step: float | None, watch: LossWatch
) -> tuple[jax.Array, jax.Array]:
    """Return a rate at which no step is longer than ``max_step``, and whether it was lowered.

    None is no bound.
    """
    if max_step is None:
        return rate, jnp.zeros((), bool)
    norm = length(direction)
    too_long = watch.risen & (rate * norm > max_step)
    return jnp.where(too_long, max_step / jnp.where(too_long, norm, 1), rate), too_long
