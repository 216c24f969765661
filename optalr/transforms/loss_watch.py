"""A bound on steps that begins once the loss has risen: scalars in, scalars out.

Shared by the rates that set themselves. Before, they are left alone: while a rule works, a bound
would only make it another rule.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LossWatch(NamedTuple):
    """What is remembered of the loss.

    Attributes:
      first_value: float32, the loss at the first step; NaN before it.
      risen: bool, whether the loss has been above a multiple of that, or not finite.
    """

    first_value: jax.Array
    risen: jax.Array


def start_watch() -> LossWatch:
    """Return the memory before the first step."""
    return LossWatch(jnp.full((), jnp.nan, jnp.float32), jnp.zeros((), bool))


def watch_loss(watch: LossWatch, value: Any, max_rise: float) -> LossWatch:
    """Return the memory after a step whose loss is ``value``; None where it is not known."""
    if value is None:
        return watch
    value = jnp.asarray(value).astype(jnp.float32)
    first = jnp.where(jnp.isnan(watch.first_value), value, watch.first_value)
    return LossWatch(first, watch.risen | ~(value <= max_rise * first))


def bound_step(
    rate: jax.Array, direction: Any, max_step: float, watch: LossWatch
) -> tuple[jax.Array, jax.Array]:
    """Return the rate at which a step is no longer than ``max_step``, and whether it is another."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(direction)]
    squares = [jnp.sum(leaf**2) for leaf in leaves]
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares))) if squares else jnp.zeros((), jnp.float32)
    too_long = watch.risen & (rate * norm > max_step)
    return jnp.where(too_long, max_step / norm, rate), too_long
