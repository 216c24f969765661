"""Which examples and positions a sample takes: unbiased, and without a key.

In: how many there are, how many to take, and a seed. Out: indices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def comb(length: int, keep: int, seed: jax.Array) -> jax.Array:
    """Return ``keep`` of ``length`` indices, evenly spaced from a random start.

    Every index is as likely as every other, so means over the comb are unbiased.
    """
    return _from_random_start(length, keep, seed, stride=length // keep)


def scatter(length: int, keep: int, seed: jax.Array) -> jax.Array:
    """Return ``keep`` of ``length`` indices, in golden-ratio steps from a random start.

    Unbiased as ``comb`` is, but not aligned with rows and columns of an image whose positions are
    numbered row by row: an even spacing would look at few columns only.
    """
    # 1/φ: multiples of the golden ratio fill an interval most evenly, however many are taken.
    stride = round(length * 0.6180339887)
    # Without a common divisor the steps visit every index before any comes twice.
    while math.gcd(stride, length) != 1:
        stride += 1
    return _from_random_start(length, keep, seed, stride=stride)


def _from_random_start(length: int, keep: int, seed: jax.Array, *, stride: int) -> jax.Array:
    # int64 in NumPy, where it costs nothing: the products may exceed 32 bits, the remainders don't.
    offsets = np.arange(keep, dtype=np.int64) * stride % length
    # Unsigned throughout: a place that cannot be negative needs no wrapping.
    places = jax.lax.rem(seed, np.uint32(length)) + offsets.astype(np.uint32)
    # Each is below twice the length; the smaller of both is the remainder, as 0 − 1 is the largest.
    return jnp.minimum(places, places - np.uint32(length))


def pick(array: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    """Return the entries at these places of an axis; each is a place, and none comes twice."""
    at = (slice(None),) * axis
    return array.at[(*at, places)].get(mode="promise_in_bounds", unique_indices=True)
