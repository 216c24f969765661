"""Following a direction at a rate: the rate's value, the step it makes, and the step's length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype


def value_at(number_or_schedule: float | Callable[[jax.Array], Any], count: jax.Array) -> Any:
    """Return the number, or what the schedule gives after ``count`` updates."""
    return number_or_schedule(count) if callable(number_or_schedule) else number_or_schedule


def follow(direction: Any, rate: jax.Array) -> Any:
    """Return ``−rate · direction``, computed in float32 or wider, in the dtypes of the direction.

    Args:
      direction: pytree of arrays.
      rate: scalar array; it takes the precision of each leaf, so that it widens none of them.
    """

    def scale(leaf: jax.Array) -> jax.Array:
        dtype = wide_dtype(leaf)
        # finfo's dtype is the real one of a complex leaf.
        return (-rate.astype(jnp.finfo(dtype).dtype) * leaf.astype(dtype)).astype(leaf.dtype)

    return jax.tree.map(scale, direction)


def follow_unless_zero(direction: Any, rate: jax.Array) -> Any:
    """Return ``follow(direction, rate)``, and zeros where the rate is zero.

    A rate of zero is how a method refuses a direction that is not finite, and ``0 · inf`` is NaN.
    """
    return jax.tree.map(lambda step: jnp.where(rate == 0, 0, step), follow(direction, rate))


def length(tree: Any) -> jax.Array:
    """Return the 2-norm of all numbers of a pytree together, float32; 0 for one without leaves."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0)))
