"""Looking at a part of a batch: which examples and positions, unbiased and without a key."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much of a batch a measurement looks at.

    Attributes:
      every: look at one example in ``every``.
      max_positions: look at no more than this many positions of an example; None for all.
    """

    every: int = 1
    max_positions: int | None = None


def comb(length: int, keep: int, seed: jax.Array) -> jax.Array:
    """Return ``keep`` of ``length`` indices, evenly spaced from a random start.

    Every index is as likely as every other, so means over the comb are unbiased.
    """
    return _from_random_start(length, length // keep, keep, seed)


def scatter(length: int, keep: int, seed: jax.Array) -> jax.Array:
    """Return ``keep`` of ``length`` indices, in golden-ratio steps from a random start.

    Unbiased as ``comb`` is, but not aligned with rows and columns of an image whose positions are
    numbered row by row: an even spacing would look at few columns only.
    """
    stride = round(length * 0.6180339887)
    while math.gcd(stride, length) != 1:
        stride += 1
    return _from_random_start(length, stride, keep, seed)


def _from_random_start(length: int, stride: int, keep: int, seed: jax.Array) -> jax.Array:
    offsets = np.arange(keep, dtype=np.int64) * stride % length
    start = (seed % jnp.uint32(length)).astype(jnp.int32)
    return (start + offsets.astype(np.int32)) % length


def spread(seed: jax.Array) -> jax.Array:
    """Mix the bits of a uint32 (the finalizer of MurmurHash3)."""
    seed = (seed ^ (seed >> 16)) * jnp.uint32(0x85EBCA6B)
    seed = (seed ^ (seed >> 13)) * jnp.uint32(0xC2B2AE35)
    return seed ^ (seed >> 16)


def sampled_counts(examples: int, positions: int, sampling: Sampling) -> tuple[int, int]:
    """Return how many examples and positions a measurement looks at."""
    keep_examples = max(1, examples // sampling.every)
    keep_positions = positions
    if sampling.max_positions is not None:
        keep_positions = min(positions, sampling.max_positions)
    return keep_examples, keep_positions


def sample(
    data: jax.Array, cotangent: jax.Array, sampling: Sampling, seed: jax.Array
) -> tuple[jax.Array, jax.Array, float]:
    """Pick examples and positions of ``(stack, examples, positions, features)``; flatten them."""
    stack, examples, positions, _ = data.shape
    keep_examples, keep_positions = sampled_counts(examples, positions, sampling)
    if keep_examples < examples:
        index = comb(examples, keep_examples, seed)
        data, cotangent = data[:, index], cotangent[:, index]
    if keep_positions < positions:
        index = scatter(positions, keep_positions, spread(seed))
        data, cotangent = data[:, :, index], cotangent[:, :, index]
    scale = examples * positions / (keep_examples * keep_positions)
    rows = keep_examples * keep_positions
    return data.reshape(stack, rows, -1), cotangent.reshape(stack, rows, -1), scale
