"""One batch must not own the statistics: measurements out of all proportion are scaled down.

A moving average gives each batch the share 1 − decay, 5 % by default. A batch whose loss is ten
thousand times as large has a hundred million times the second moment. It would rule the average for
hundreds of measurements, in which the steps would be close to zero.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import as_vector
from optalr.linalg.structured import Structured
from optalr.transforms.kronecker.leaves import Kernel, Leaf
from optalr.transforms.kronecker.memory import LeafMemory

# A measurement may have this many times the mean eigenvalue of the average. At the default decay
# the average then grows at most 2.5-fold. A scale that has really changed is caught up with at that
# rate; during the first measurements, whose share is larger, faster still.
_PROPORTION = 30.0
# An average is young before there are roots, and for so many measurements even if roots come early:
# else a first batch that is out of proportion would own it.
YOUNG = 10


class Trust(NamedTuple):
    """What the averages are worth."""

    weight: jax.Array  # () float32, the sum of their weights
    is_young: jax.Array  # () bool, whether later batches may still judge them


class Measurement(NamedTuple):
    """The statistics of one kernel in one batch."""

    rows: Structured
    cols: Structured
    second_moment: Any  # where one is kept


class Weights(NamedTuple):
    """What a measurement and the average so far are multiplied by, and then added up."""

    average: jax.Array  # (layers,), one number an entry of the stack axes
    new: jax.Array


class Left(NamedTuple):
    """What is left of all sides of all leaves, as vectors: each is scaled by its share.

    Attributes:
      new: of the measurements.
      average: of the averages so far.
      over: bool, where a measurement is scaled down.
      unit: what the gradient's rescaling on arrival makes of the measurements.
      places: of each leaf, where its sides' numbers begin and end.
      stacks: of each leaf, the stack axes that its sides' numbers belong to.
    """

    new: jax.Array
    average: jax.Array
    over: jax.Array
    unit: jax.Array
    places: dict[int, list[tuple[int, int]]]
    stacks: dict[int, tuple[int, ...]]

    def weights(self, decay: Any) -> dict[int, list[Weights]]:
        """Return the weights of a moving average, by the leaf's position and side."""
        decay = jnp.asarray(decay, self.new.dtype)
        average, new = decay * self.average, (1 - decay) * self.new * self.unit
        return {
            i: [Weights(self._part(average, i, k), self._part(new, i, k)) for k in range(len(each))]
            for i, each in self.places.items()
        }

    def tame(self, i: int) -> jax.Array:
        """Return the product of the shares that are left of a kernel's two measurements."""
        return self._part(self.new, i, 0) * self._part(self.new, i, 1)

    def _part(self, vector: jax.Array, i: int, side: int) -> jax.Array:
        return jax.lax.slice_in_dim(vector, *self.places[i][side])


def in_proportion(
    measured: Mapping[int, Any],
    leaves: Sequence[Leaf],
    memories: Sequence[LeafMemory],
    *,
    trust: Trust,
    rescaled: tuple[set[int], jax.Array],
) -> Left:
    """Return what is left of each leaf's statistics: of a kernel's rows and columns, or of a leaf.

    All are judged together, by few operations.

    Args:
      measured: what this batch shows, by the leaf's position: a ``Measurement``, or squares.
      leaves: of all positions.
      memories: the averages without this batch.
      trust: what the averages are worth.
      rescaled: kernels whose gradient was multiplied by a factor, and the factor, () float32. The
        moments of their layers' cotangents were not.
    """
    traces = {i: _traces(new, leaves[i], memories[i]) for i, new in measured.items()}
    sides = [side for each in traces.values() for side in each]
    if not sides:
        nothing = jnp.zeros(0)
        return Left(nothing, nothing, nothing > 0, nothing, {}, {})
    counts = [math.prod(jnp.shape(side.new)) for side in sides]
    spans = itertools.pairwise(np.cumsum([0, *counts]).tolist())
    chosen, share = rescaled
    outputs = [
        i in chosen and side == getattr(leaves[i], "output_side", None)
        for i, each in traces.items()
        for side in range(len(each))
    ]
    rows = np.repeat([side.rows for side in sides], counts)
    news, olds = (as_vector([side[k] for side in sides]) for k in (0, 1))
    unit = jnp.where(np.repeat(outputs, counts), jnp.square(share).astype(news.dtype), 1)
    rows = rows.astype(news.dtype)
    return Left(
        *_shares(news * (unit / rows), olds / rows, trust),
        unit=unit,
        places={i: [next(spans) for _ in each] for i, each in traces.items()},
        stacks={i: jnp.shape(each[0].new) for i, each in traces.items()},
    )


class _Traces(NamedTuple):
    """What the mean eigenvalues of one side follow from, or the mean square of a leaf."""

    new: jax.Array  # of the measurement, one number a layer of the stack
    average: jax.Array  # of the average so far
    rows: int  # what both are divided by


def _traces(new: Any, leaf: Leaf, memory: LeafMemory) -> list[_Traces]:
    if not isinstance(leaf, Kernel):
        return [_Traces(jnp.sum(new), jnp.sum(memory.second_moment), max(1, new.size))]
    old = leaf.rows.holding(memory.rows.factor), leaf.cols.holding(memory.cols.factor)
    pairs = zip((new.rows, new.cols), old, strict=True)
    return [_Traces(new.trace(), side.trace(), side.padded_size) for new, side in pairs]


def _shares(
    new: jax.Array, total: jax.Array, trust: Trust
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what is left of measurements and of the averages so far, and where of the former.

    Args:
      new: mean eigenvalue, or mean square, of each measurement.
      total: that of its average, not corrected for its start at zero; 0 where nothing has been
        seen, which bounds nothing.
      trust: what the averages are worth.
    """
    average = total / jnp.where(trust.weight > 0, trust.weight, 1).astype(total.dtype)
    limit = _PROPORTION * average
    over = (average > 0) & (new > limit) & jnp.isfinite(new)
    # The first batch has nothing to be judged by. So while the average is young the later ones
    # judge it.
    under = trust.is_young & (new > 0) & (average > _PROPORTION * new)
    return (
        jnp.where(over, limit / jnp.where(over, new, 1), 1).astype(new.dtype),
        jnp.where(under, _PROPORTION * new / jnp.where(under, average, 1), 1).astype(new.dtype),
        over,
    )
