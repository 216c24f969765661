"""By how much a gradient was rescaled between the loss and the method.

Clipping, loss scaling and their like multiply the gradient and leave the curvature that the loss
revealed as it was. A method that divides the one by the other must know the number, or its step
depends on a scale that means nothing. Both ends are known: ``extras["grad"]`` is the gradient as
the loss gave it, and ``updates`` is what arrived.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import at_least_float32
from optalr.linalg.minres.vectors import divide, dot, largest, nonzero
from optalr.signals.ray import by_path

# Two gradients are multiples of each other where sin² of the angle between them is below this.
# Rounding to bfloat16 turns a gradient by 1e-5. A momentum or a penalty turns it by far more.
_PARALLEL = 1e-3


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
    # In units of the largest entries, so that no square leaves float32's range.
    wide = at_least_float32(updates), at_least_float32(gradient)
    units = [largest(tree) for tree in wide]
    new, old = (divide(tree, unit) for tree, unit in zip(wide, units, strict=True))
    new_square, old_square, mixed = dot(new, new), dot(old, old), dot(new, old)
    measurable = (new_square > 0) & (old_square > 0)
    both = jnp.where(measurable, new_square * old_square, 1)
    parallel = measurable & (1 - jnp.square(mixed) / both <= _PARALLEL)
    ratio = jnp.abs(mixed) / jnp.where(measurable, old_square, 1)
    scale = ratio * (units[0] / nonzero(units[1]))
    return jnp.where(parallel & jnp.isfinite(scale), scale, 1).astype(jnp.float32)
