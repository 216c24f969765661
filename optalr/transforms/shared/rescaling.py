"""By how much a gradient was rescaled between the loss and the method.

Clipping, loss scaling and their like multiply the gradient and leave the curvature that the loss
revealed as it was. A method that divides the one by the other must know the number, or its step
depends on a scale that means nothing. Both ends are known: ``extras["grad"]`` is the gradient as
the loss gave it, and ``updates`` is what arrived.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype
from optalr.signals.ray import by_path

# Two gradients are multiples of each other where sin² of the angle between them is below this.
# Rounding to bfloat16 turns a gradient by 1e-5. A momentum or a penalty turns it by far more.
_PARALLEL = 1e-3


class _Products(NamedTuple):
    """Inner products of two arrays that are divided by their largest entries."""

    of_updates: jax.Array
    of_gradient: jax.Array
    mixed: jax.Array


def leaf_scales(updates: Any, gradient: Any) -> list[jax.Array]:
    """Return, for each leaf of ``updates``, the |c| that its gradient was multiplied by.

    Args:
      updates: what arrived, all leaves of the gradient or some.
      gradient: the gradient as the loss gave it, paired by key path; None where it is not known.

    Returns:
      float32 scalars; 1 for a leaf that is no multiple of its gradient, is zero, or is unknown.
    """
    known = {} if gradient is None else by_path(gradient)
    scales = []
    for path, leaf in by_path(updates).items():
        if path not in known or known[path].shape != leaf.shape:
            scales.append(jnp.ones((), jnp.float32))
        else:
            scales.append(_scale([leaf], [known[path]]))
    return scales


def tree_scale(updates: Any, gradient: Any) -> jax.Array:
    """Return the |c| that all leaves of a gradient were multiplied by, as ``leaf_scales`` does."""
    known, given = {} if gradient is None else by_path(gradient), by_path(updates)
    if not given or any(p not in known or known[p].shape != x.shape for p, x in given.items()):
        return jnp.ones((), jnp.float32)
    return _scale(list(given.values()), [known[path] for path in given])


def _scale(updates: list[jax.Array], gradient: list[jax.Array]) -> jax.Array:
    """Return |c| where ``updates`` is c times ``gradient``, and 1 elsewhere; float32."""
    new, new_unit = _in_units(updates)
    old, old_unit = _in_units(gradient)
    products = _Products(_inner(new, new), _inner(old, old), _inner(new, old))
    measurable = (products.of_updates > 0) & (products.of_gradient > 0)
    both = jnp.where(measurable, products.of_updates * products.of_gradient, 1)
    parallel = measurable & (1 - jnp.square(products.mixed) / both <= _PARALLEL)
    ratio = jnp.abs(products.mixed) / jnp.where(measurable, products.of_gradient, 1)
    scale = ratio * (new_unit / old_unit)
    return jnp.where(parallel & jnp.isfinite(scale), scale, 1).astype(jnp.float32)


def _in_units(leaves: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Return arrays over the largest entry of all, so that no square leaves float32's range."""
    wide = [leaf.astype(wide_dtype(leaf)) for leaf in leaves]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in wide]))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return [leaf / unit.astype(jnp.finfo(leaf.dtype).dtype) for leaf in wide], unit


def _inner(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    products = [jnp.sum(x * jnp.conj(y)).real for x, y in zip(a, b, strict=True)]
    return sum(products[1:], start=products[0])
