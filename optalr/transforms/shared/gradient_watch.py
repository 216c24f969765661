"""Faults in a gradient: numbers that are not finite, and a length out of all proportion.

One batch in a million is broken: a corrupt record, an overflow in half precision, a loss that
divides by almost nothing. Its gradient must not reach a momentum, a moment or a parameter, where it
would stay for hundreds of steps. Whatever is large is judged by the largest gradient of late, which
needs no scale from the user. With n = ‖g‖, and k gradients too long in a row before it,

    g ← g m / n,  k ← k + 1    if n > 10 · 1.5ᵏ m,    else    m ← max(n, 0.999 m),  k ← 0.

So steps keep their old length until a scale that has really changed is believed. A single fault,
or one in every few batches, changes nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import wide_dtype
from optalr.states import count_up

# Nothing shorter than this many times the longest of late is touched.
_PROPORTION = 10.0
# How much more is believed with each gradient in a row: twelve steps for a scale of a thousand.
_GROWTH = 1.5
_LONGEST_ROW = 200  # its power of the growth is still in range
# The largest norm is forgotten over some thousand steps. A mean would forget the hard examples of a
# well fitted set, which come once in a hundred batches with a thousand times the usual gradient.
_MEMORY = 0.999
# A number whose square times 2^±128 is in range where its own square is not.
_UNIT = 2.0**-64


class GradientWatch(NamedTuple):
    """What is remembered of the gradients' lengths."""

    largest_norm: jax.Array  # () float32, m; 0 before the first gradient that is not zero
    num_long: jax.Array  # () int32, k, gradients in a row that were too long


class Admitted(NamedTuple):
    """A gradient that may be used.

    Attributes:
      updates: the gradient; zeros in place of a bad one, a shorter one in place of one too long.
      watch: the memory after it.
      bad: () bool, whether it was not finite, or so large that its square is not.
      failed: () bool, whether it was bad or too long.
    """

    updates: Any
    watch: GradientWatch
    bad: jax.Array
    failed: jax.Array


def start_gradient_watch() -> GradientWatch:
    """Return the memory before the first gradient."""
    return GradientWatch(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def admit(updates: Any, watch: GradientWatch, *, squares: bool = True) -> Admitted:
    """Return what may be used of a gradient, in the dtypes that it came in.

    Args:
      updates: the gradient.
      watch: the memory so far.
      squares: whether squares are taken of it, so that they must be finite too.
    """
    norm, total = _norm(updates)
    # The norm of anything not finite is not finite either. A square that overflows would end every
    # moment of squares.
    bad = ~jnp.isfinite(total if squares else norm)
    row = jnp.minimum(watch.num_long, _LONGEST_ROW).astype(jnp.float32)
    limit = _PROPORTION * jnp.power(jnp.float32(_GROWTH), row) * watch.largest_norm
    # A first gradient has nothing to be judged by, and zeros say nothing of the scale.
    long = ~bad & (watch.largest_norm > 0) & (norm > limit)
    share = jnp.where(long, watch.largest_norm / jnp.where(long, norm, 1), 1)
    usual = ~(bad | long | (norm == 0))
    seen = jnp.maximum(norm, _MEMORY * watch.largest_norm)
    largest = jnp.where(usual, seen, watch.largest_norm).astype(jnp.float32)
    num_long = jnp.where(usual, 0, count_up(watch.num_long, long))

    def tame(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(wide_dtype(leaf))
        shorter = (wide * share.astype(_real(wide))).astype(leaf.dtype)
        return jnp.where(bad, jnp.zeros_like(leaf), jnp.where(long, shorter, leaf))

    return Admitted(jax.tree.map(tame, updates), GradientWatch(largest, num_long), bad, bad | long)


def _norm(updates: Any) -> tuple[jax.Array, jax.Array]:
    """Return the 2-norm of all numbers together, and its square, in float32 or wider.

    The square may be out of range where the norm is not.
    """
    leaves = [leaf.astype(wide_dtype(leaf)) for leaf in jax.tree.leaves(updates)]
    plain = _sum_of_squares(leaves, None)
    in_range = jnp.isfinite(plain) & (plain > _UNIT)

    def select(plain: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
        return jnp.where(in_range, jnp.sqrt(plain), _far_norm(leaves))

    def branch(plain: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
        return jax.lax.cond(in_range, lambda _: jnp.sqrt(plain), _far_norm, leaves)

    # An accelerator takes all sums in one pass, and would wait for the answer of a branch. A CPU
    # takes a pass for each.
    return jax.lax.platform_dependent(plain, leaves, cpu=branch, default=select), plain


def _far_norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Return the norm of numbers of which the squares are out of range."""
    large = jnp.sqrt(_sum_of_squares(leaves, _UNIT)) / _UNIT
    small = jnp.sqrt(_sum_of_squares(leaves, 1 / _UNIT)) * _UNIT
    return jnp.where(jnp.isfinite(small), small, large)


def _sum_of_squares(leaves: Sequence[jax.Array], unit: float | None) -> jax.Array:
    """Return the sum of squares of all numbers, each times ``unit``."""
    total = jnp.float32(0)
    for leaf in leaves:
        numbers = jnp.abs(leaf) if jnp.iscomplexobj(leaf) else leaf
        if unit is not None:
            # A barrier, because XLA would turn (x u)² into x² u², which is out of range again.
            factor = jax.lax.optimization_barrier(jnp.float32(unit))
            numbers = numbers * factor.astype(numbers.dtype)
        total = total + jnp.sum(jnp.square(numbers))
    return total


def _real(array: jax.Array) -> Any:
    """Return the dtype of an array's real part."""
    return jnp.finfo(array.dtype).dtype
