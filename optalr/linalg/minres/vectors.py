"""Arithmetic on pytrees that stand for vectors."""

from typing import Any

import jax
import jax.numpy as jnp


def dot(x: Any, y: Any) -> jax.Array:
    """Return the inner product of two pytrees."""
    products = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y))
    return jnp.sum(jnp.stack(products))


def largest(tree: Any) -> jax.Array:
    """Return the largest absolute entry of a pytree."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]))


def multiply(tree: Any, factor: Any) -> Any:
    """Return the pytree times a number."""
    return jax.tree.map(lambda x: factor * x, tree)


def divide(tree: Any, by: jax.Array) -> Any:
    """Return the pytree divided by a number, or by 1 where that is zero."""
    return jax.tree.map(lambda x: x / nonzero(by), tree)


def add(x: Any, factor: jax.Array, y: Any) -> Any:
    """Return ``x + factor * y``."""
    return jax.tree.map(lambda a, b: a + factor * b, x, y)


def where(condition: jax.Array, x: Any, y: Any) -> Any:
    """Return ``x`` where the condition holds, else ``y``."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def cast_like(tree: Any, like: Any) -> Any:
    """Return the pytree in the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def nonzero(x: jax.Array) -> jax.Array:
    """Return the number, or 1 where it is zero."""
    return jnp.where(x == 0, jnp.ones_like(x), x)
