"""What every room needs to know of arrays: whether they are finite, and wide enough for sums."""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a pytree is finite; True for a tree without leaves."""
    parts = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(parts).all() if parts else jnp.bool_(True)


def wide_dtype(*values: Any) -> Any:
    """Return the dtype that holds all of ``values`` (arrays or dtypes), float32 or wider.

    Half precision is for storage only. In bfloat16 a sum stops growing once it is 256 times a term,
    and a decay of 0.999 rounds to 1.
    """
    return jnp.promote_types(jnp.result_type(*values), jnp.float32)


def at_least_float32(tree: Any) -> Any:
    """Return a pytree with its floating leaves in float32 or wider, and all others as they are."""

    def widen(leaf: Any) -> Any:
        return leaf.astype(wide_dtype(leaf)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, tree)


def as_inexact(tree: Any) -> Any:
    """Return a pytree of arrays, with integers and bools in floating point.

    optax's rules make floats of them too. In their own dtype a step would be rounded to zero.
    """

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        array = jnp.asarray(leaf)
        inexact = jnp.issubdtype(array.dtype, jnp.inexact)
        return array if inexact else array.astype(wide_dtype(array))

    return jax.tree.map(convert, tree)


def moving_average(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """Return ``decay · old + (1 − decay) · new``, in the dtype of the old."""
    decay = jnp.asarray(decay, old.dtype)
    return decay * old + (1 - decay) * new.astype(old.dtype)


def damped_power(values: jax.Array, damping: Any, power: Any) -> jax.Array:
    """Return ``(values + damping)^power``, and 1 where the base is not positive."""
    base = values + damping
    safe = jnp.where(base > 0, base, 1)
    return jnp.where(base > 0, jnp.power(safe, jnp.asarray(power, values.dtype)), 1)
