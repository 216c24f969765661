"""The receptive fields of a convolution, laid out as rows.

In: padded channels-last data and where the window stands (``Geometry``). Out: what the window sees,
``(N, T, K, C)`` for N examples, T output positions, K kernel positions and C channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.signals.tracing.sampling import pick


class Geometry(NamedTuple):
    """Where a convolution's window stands: all per spatial axis.

    Fields:
      kernel: the window's size.
      out: the size of the output.
      strides: how far the window moves from one output position to the next.
      dilation: how far apart neighbours in the window are.
    """

    kernel: Sequence[int]
    out: Sequence[int]
    strides: Sequence[int]
    dilation: Sequence[int]

    @property
    def area(self) -> int:
        """The number of kernel positions."""
        return math.prod(self.kernel)


def slice_patches(padded: jax.Array, geometry: Geometry) -> jax.Array:
    """Return every patch, by one strided slice a kernel position."""
    # With all patches wanted, the entries at one kernel position form a regular grid, and a slice
    # copies it without an index array.
    pieces = []
    for flat in range(geometry.area):
        offset = _unravel(flat, geometry.kernel)
        start = [o * d for o, d in zip(offset, geometry.dilation, strict=True)]
        limit = [
            s + (out - 1) * stride + 1
            for s, out, stride in zip(start, geometry.out, geometry.strides, strict=True)
        ]
        piece = jax.lax.slice(
            padded,
            (0, *start, 0),
            (padded.shape[0], *limit, padded.shape[-1]),
            (1, *geometry.strides, 1),
        )
        pieces.append(piece)
    # Side by side along the channels, which is one operation for all.
    patches = jnp.concatenate(pieces, axis=-1)
    return patches.reshape(padded.shape[0], -1, geometry.area, padded.shape[-1])


def gather_patches(padded: jax.Array, geometry: Geometry, index: jax.Array) -> jax.Array:
    """Return the patches at the flat output positions ``index``."""
    # All spatial axes are one flat axis here. A pitch is the distance, in that axis, between
    # neighbours along one of them.
    spatial = padded.shape[1:-1]
    pitches = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    # Where the window's corner is, for each output position: a table has fewer operations than the
    # arithmetic, and no remainders.
    grids = np.indices(geometry.out, dtype=np.uint32).reshape(len(spatial), -1)
    steps = np.multiply(geometry.strides, pitches).astype(np.uint32)
    corner = pick(jnp.asarray(steps @ grids), index, 0)
    window = [
        sum(
            o * d * p
            for o, d, p in zip(
                _unravel(flat, geometry.kernel), geometry.dilation, pitches, strict=True
            )
        )
        for flat in range(geometry.area)
    ]
    flat_data = padded.reshape(padded.shape[0], math.prod(spatial), padded.shape[-1])
    places = corner[:, None] + jnp.array(window, corner.dtype)[None, :]
    # No place is out of bounds: the padding holds every window.
    return flat_data.at[:, places].get(mode="promise_in_bounds")


def _unravel(flat: int, shape: Sequence[int]) -> list[int]:
    """Return the multi-index of a flat, row-major index."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]
