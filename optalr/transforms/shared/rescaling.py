"""By how much a gradient was rescaled between the loss and the method.

Clipping, loss scaling and their like multiply the gradient and leave the curvature that the loss
revealed as it was. A method that divides the one by the other must know the number, or its step
depends on a scale that means nothing. Both ends are known: ``extras["grad"]`` is the gradient as
the loss gave it, and ``updates`` is what arrived.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import at_least_float32
from optalr.linalg.minres.vectors import nonzero
from optalr.signals.ray import by_path
from optalr.transforms.shared.gradient_watch import Watched

# Two gradients are multiples of each other where sin² of the angle between them is below this.
# Rounding to bfloat16 turns a gradient by 1e-5. A momentum or a penalty turns it by far more.
_PARALLEL = 1e-3


def leaf_scales(updates: Any, gradient: Any, *, of: Sequence[int]) -> dict[int, jax.Array]:
    """Return the |c| that a leaf's gradient was multiplied by, for some leaves of ``updates``.

    Args:
      updates: what arrived, all leaves of the gradient or some.
      gradient: the gradient as the loss gave it, paired by key path; None where it is not known.
      of: the leaves, by position.

    Returns:
      float32 scalars, by position; 1 for a leaf that is no multiple of its gradient, is zero, or is
      unknown.
    """
    known = {} if gradient is None else by_path(gradient)
    arrived = list(by_path(updates).items())
    pairs = {
        i: (leaf, known[path])
        for i, (path, leaf) in enumerate(arrived)
        if i in of and path in known and known[path].shape == leaf.shape
    }
    scales = dict.fromkeys(of, jnp.ones((), jnp.float32))
    if pairs:
        found = _scales([([new], [old]) for new, old in pairs.values()])
        scales.update(zip(pairs, found, strict=True))
    return scales


def untouched(updates: Any, gradient: Any, watched: Watched | None) -> set[int]:
    """Return the positions of leaves that are the loss's gradient and nothing else.

    Args:
      updates: what arrived.
      gradient: as the loss gave it, paired by key path; None where it is not known.
      watched: what was made of it on the way, by one factor for all leaves; None for nothing.
    """
    known = {} if gradient is None else by_path(gradient)
    raw = known if watched is None else by_path(watched.raw)
    shown = known if watched is None else by_path(watched.updates)
    return {
        i
        for i, (path, leaf) in enumerate(by_path(updates).items())
        if path in known and shown.get(path) is leaf and raw[path] is known[path]
    }


def tree_scale(updates: Any, gradient: Any) -> jax.Array:
    """Return the |c| that all leaves of a gradient were multiplied by, as ``leaf_scales`` does."""
    known, given = {} if gradient is None else by_path(gradient), by_path(updates)
    if not given or any(p not in known or known[p].shape != x.shape for p, x in given.items()):
        return jnp.ones((), jnp.float32)
    return _scales([(list(given.values()), [known[path] for path in given])])[0]


def _scales(pairs: Sequence[tuple[list[jax.Array], list[jax.Array]]]) -> jax.Array:
    """Return |c| where a tree is c times another, and 1 elsewhere, for all pairs; float32."""
    # In units of the largest entries, so that no square leaves float32's range.
    wide = [(at_least_float32(new), at_least_float32(old)) for new, old in pairs]
    units = [nonzero(jnp.stack(list(map(_largest, trees)))) for trees in zip(*wide, strict=True)]
    rows = []
    for i, trees in enumerate(wide):
        new, old = ([x / unit[i] for x in tree] for tree, unit in zip(trees, units, strict=True))
        rows.append([_dot(new, new), _dot(old, old), _dot(new, old)])
    new_square, old_square, mixed = (jnp.stack(column) for column in zip(*rows, strict=True))
    measurable = (new_square > 0) & (old_square > 0)
    both = jnp.where(measurable, new_square * old_square, 1)
    parallel = measurable & (1 - jnp.square(mixed) / both <= _PARALLEL)
    ratio = jnp.abs(mixed) / jnp.where(measurable, old_square, 1)
    scale = ratio * (units[0] / units[1])
    return jnp.where(parallel & jnp.isfinite(scale), scale, 1).astype(jnp.float32)


def _largest(tree: list[jax.Array]) -> jax.Array:
    sizes = [jnp.max(jnp.abs(x)) for x in tree if x.size]
    return functools.reduce(jnp.maximum, sizes) if sizes else jnp.float32(0)


def _dot(x: list[jax.Array], y: list[jax.Array]) -> jax.Array:
    products = [jnp.sum(a * b) for a, b in zip(x, y, strict=True)]
    return functools.reduce(jnp.add, products)
