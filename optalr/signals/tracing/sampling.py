"""Looking at a part of a batch: which examples and positions, unbiased and without a key.

In: the sizes of a batch, how much of it to look at (``Sampling``), and a seed. Out: indices, or the
two sides of a layer at these places (``Signals``).
"""

import dataclasses
import math
from typing import NamedTuple

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

    def counts(self, examples: int, positions: int) -> tuple[int, int]:
        """Return how many of these examples and positions a measurement looks at."""
        keep_examples = max(1, examples // self.every)
        if self.max_positions is None:
            return keep_examples, positions
        return keep_examples, min(positions, self.max_positions)


class Signals(NamedTuple):
    """The two sides of a layer, laid out for the Gram products.

    With S layers in the stack, R rows of inputs and R' of outputs (a convolution's groups count as
    rows of the inputs):

    Fields:
      inputs: ``(S, R, m)`` what went into the layer.
      outputs: ``(S, R', n)`` the cotangents of what came out.
      scale: by how much a sum over the rows of outputs must be multiplied to estimate the sum over
        all positions of all examples.
    """

    inputs: jax.Array
    outputs: jax.Array
    scale: float


def sample(inputs: jax.Array, outputs: jax.Array, take: tuple[Sampling, jax.Array]) -> Signals:
    """Pick examples and positions of ``(stack, examples, positions, features)``; flatten them.

    Args:
      inputs: the input's side.
      outputs: the output's side, with the same axes but the last.
      take: how much to look at, and a uint32 scalar that decides where.
    """
    sampling, seed = take
    stack, examples, positions, _ = inputs.shape
    keep_examples, keep_positions = sampling.counts(examples, positions)
    if keep_examples < examples:
        index = comb(examples, keep_examples, seed)
        inputs, outputs = inputs[:, index], outputs[:, index]
    if keep_positions < positions:
        # Another seed, or the place in the image would follow from the example.
        index = scatter(positions, keep_positions, spread(seed))
        inputs, outputs = inputs[:, :, index], outputs[:, :, index]
    scale = examples * positions / (keep_examples * keep_positions)
    rows = keep_examples * keep_positions
    return Signals(inputs.reshape(stack, rows, -1), outputs.reshape(stack, rows, -1), scale)


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
    start = (seed % jnp.uint32(length)).astype(jnp.int32)
    return (start + offsets.astype(np.int32)) % length


def spread(seed: jax.Array) -> jax.Array:
    """Mix the bits of a uint32 (the finalizer of MurmurHash3)."""
    seed = (seed ^ (seed >> 16)) * jnp.uint32(0x85EBCA6B)
    seed = (seed ^ (seed >> 13)) * jnp.uint32(0xC2B2AE35)
    return seed ^ (seed >> 16)
