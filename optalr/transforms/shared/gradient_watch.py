"""Faults in a gradient: numbers that are not finite, and a length out of all proportion.

One batch in a million is broken: a corrupt record, an overflow in half precision, a loss that
divides by almost nothing. Its gradient must not reach a momentum, a moment or a parameter, where it
would stay for hundreds of steps. Whatever is large is judged by the largest gradient of late, which
needs no scale from the user. With n = ‖g‖, and k gradients too long in a row before it,

    g ← g m / n,  k ← k + 1    if n > 10 · 1.5ᵏ m,    else    m ← max(n, 0.999 m),  k ← 0.

So steps keep their old length until a scale that has really changed is believed. A single fault,
or one in every few batches, changes nothing.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import power_of_two_below, wide_dtype
from optalr.states import count_up

# Nothing shorter than this many times the longest of late is touched.
_PROPORTION = 10.0
# How much more is believed with each gradient in a row: twelve steps for a scale of a thousand.
_GROWTH = 1.5
_LONGEST_ROW = 200  # its power of the growth is still in range
# The largest norm is forgotten over some thousand steps. A mean would forget the hard examples of a
# well fitted set, which come once in a hundred batches with a thousand times the usual gradient.
_MEMORY = 0.999
# A sum of squares below this has lost some of them to underflow.
_SMALLEST = 2.0**-90


class GradientWatch(NamedTuple):
    """What is remembered of the gradients' lengths."""

    largest_norm: jax.Array  # () float32, m; 0 before the first gradient that is not zero
    num_long: jax.Array  # () int32, k, gradients in a row that were too long


class Admitted(NamedTuple):
    """A gradient that may be used.

    Attributes:
      updates: the gradient; zeros in place of a bad one, a shorter one in place of one too long.
      watch: the memory after it.
      share: () float32, what one too long was multiplied by, here or before; 1 for others.
      bad: () bool, whether it was not finite, or so large that its square is not.
      failed: () bool, whether it was bad or too long.
      empty: () bool, whether zeros have taken its place, here or before.
    """

    updates: Any
    watch: GradientWatch
    share: jax.Array
    bad: jax.Array
    failed: jax.Array
    empty: jax.Array


class Watched(NamedTuple):
    """What ``two_stage`` tells the stage inside it, as the extra ``WATCHED``.

    The gradient has been admitted, so nobody needs to look at the same arrays again. In control
    flow, where every array is another one, nothing is told.
    """

    raw: Any  # the gradient as it arrived
    updates: Any  # what was made of it
    share: jax.Array  # () float32, by what factor
    empty: jax.Array  # () bool, whether that was zeros, because it was not finite


WATCHED = "watched"


def start_gradient_watch() -> GradientWatch:
    """Return the memory before the first gradient."""
    return GradientWatch(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def admit(
    updates: Any, watch: GradientWatch, *, squares: bool = True, zeros: bool = True
) -> Admitted:
    """Return what may be used of a gradient, in the dtypes that it came in.

    Args:
      updates: the gradient.
      watch: the memory so far.
      squares: whether squares are taken of it, so that they must be finite too.
      zeros: whether zeros take the place of a bad one. Else its user makes its update zero.
    """
    size = _size(updates, watch.largest_norm)
    norm = size.norm
    # The norm of anything not finite is not finite either. A square that overflows would end every
    # moment of squares.
    bad = ~jnp.isfinite(jnp.square(norm) if squares else norm)
    row = jnp.minimum(watch.num_long, _LONGEST_ROW).astype(jnp.float32)
    limit = _PROPORTION * jnp.power(jnp.float32(_GROWTH), row) * watch.largest_norm
    # A first gradient has nothing to be judged by, and zeros say nothing of the scale.
    long = ~bad & (watch.largest_norm > 0) & (norm > limit)
    share = jnp.where(long, watch.largest_norm / jnp.where(long, norm, 1), 1)
    usual = ~(bad | long | (norm == 0))
    # Of a first gradient out of range only bounds are known. The lower one is remembered, and a row
    # of long ones beside it, so that the next is measured in its unit and judged by the upper one.
    rough = ~size.in_range & (watch.largest_norm == 0)
    seen = jnp.where(rough, size.largest, jnp.maximum(norm, _MEMORY * watch.largest_norm))
    largest = jnp.where(usual, seen, watch.largest_norm).astype(jnp.float32)
    row = jnp.where(rough, size.row, 0)
    num_long = jnp.where(usual, row, count_up(watch.num_long, long)).astype(jnp.int32)

    def tame(leaf: jax.Array) -> jax.Array:
        wide = leaf.astype(wide_dtype(leaf))
        # The share is 1 for all that is neither, which changes no bit.
        shorter = (wide * share.astype(_real(wide))).astype(leaf.dtype)
        return jnp.where(bad, jnp.zeros_like(leaf), shorter) if zeros else shorter

    watch = GradientWatch(largest, num_long)
    empty = bad if zeros else jnp.bool_(False)
    return Admitted(jax.tree.map(tame, updates), watch, share, bad, bad | long, empty)


def admit_unless(
    watched: Watched | None, updates: Any, watch: GradientWatch, **options: bool
) -> Admitted:
    """Return what ``admit`` does, or a gradient as it is that has been admitted already.

    What a rule in between has made of it is admitted again: it may have divided by zero.
    """
    if watched is None:
        return admit(updates, watch, **options)
    shown = {id(leaf) for leaf in jax.tree.leaves(watched.updates)}
    if any(id(leaf) not in shown for leaf in jax.tree.leaves(updates)):
        given = admit(updates, watch, **options)
        share, empty = given.share * watched.share, given.empty | watched.empty
        return given._replace(share=share, empty=empty)
    never = jnp.bool_(False)
    return Admitted(updates, watch, watched.share, never, never, watched.empty)


class _Size(NamedTuple):
    """How long a gradient is, in float32 or wider."""

    norm: jax.Array  # where it is out of range, a bound by the largest number
    largest: jax.Array  # the largest number
    in_range: jax.Array  # () bool
    row: int  # by how many factors of _GROWTH a bound may exceed the norm


def _size(updates: Any, usual: jax.Array) -> _Size:
    """Return how long a gradient is, without a branch.

    Squares are taken in a unit near the ``usual`` norm, a power of two, which rounds nothing. They
    are out of range where the norm is more than 2^45 below that or 2^60 above it.
    """
    leaves = [leaf.astype(wide_dtype(leaf)) for leaf in jax.tree.leaves(updates) if leaf.size]
    if not leaves:
        return _Size(jnp.float32(0), jnp.float32(0), jnp.bool_(True), 0)
    # A power of two, which rounds nothing; zero has none.
    least, most = (np.array(2.0**e, usual.dtype) for e in (-100, 100))
    unit = jax.lax.clamp(least, power_of_two_below(usual), most)
    unit = jnp.where(usual > 0, unit, 1)
    inverse = 1 / unit  # exact; a product is cheaper than a quotient
    sizes = [jnp.abs(leaf) for leaf in leaves]
    squares = [jnp.sum(jnp.square(size * inverse.astype(size.dtype))) for size in sizes]
    # Few operations for each leaf: there are many leaves, and each operation is compiled.
    total = functools.reduce(jnp.add, squares)
    largest = functools.reduce(jnp.maximum, [jnp.max(size) for size in sizes])
    in_range = jnp.isfinite(total) & (total > _SMALLEST)
    excess = sum(leaf.size for leaf in leaves) ** 0.5
    norm = jnp.where(in_range, jnp.sqrt(total) * unit, largest * excess)
    row = min(_LONGEST_ROW, math.ceil(math.log(excess, _GROWTH)))
    return _Size(norm, largest, in_range, row)


def _real(array: jax.Array) -> Any:
    """Return the dtype of an array's real part."""
    return jnp.finfo(array.dtype).dtype
