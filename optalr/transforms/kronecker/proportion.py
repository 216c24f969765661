"""One batch must not own the statistics: measurements out of all proportion are scaled down.

A moving average gives each batch the share 1 − decay, 5 % by default. A batch whose loss is ten
thousand times as large has a hundred million times the second moment. It would rule the average for
hundreds of measurements, in which the steps would be close to zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arrays import as_vector, like_parts
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


class Shares(NamedTuple):
    """What is left of two numbers that are out of proportion: each is scaled by its share."""

    new: jax.Array  # of the measurement
    average: jax.Array  # of the average so far
    over: jax.Array  # bool, whether the measurement is scaled down


def in_proportion(
    measured: Mapping[int, Any],
    leaves: Sequence[Leaf],
    memories: Sequence[LeafMemory],
    *,
    trust: Trust,
) -> dict[int, tuple[Shares, ...]]:
    """Return what is left of each leaf's statistics: of a kernel's rows and columns, or of a leaf.

    All are judged together, by few operations.

    Args:
      measured: what this batch shows, by the leaf's position: a ``Measurement``, or squares.
      leaves: of all positions.
      memories: the averages without this batch.
      trust: what the averages are worth.
    """
    pairs = {i: _means(new, leaves[i], memories[i]) for i, new in measured.items()}
    if not pairs:
        return {}
    news, olds = zip(*(pair for each in pairs.values() for pair in each), strict=True)
    found = _shares(as_vector(news), as_vector(olds), trust)
    parts = zip(*(like_parts(column, news) for column in found), strict=True)
    left = (Shares(*part) for part in parts)
    return {i: tuple(next(left) for _ in each) for i, each in pairs.items()}


def _means(new: Any, leaf: Leaf, memory: LeafMemory) -> list[tuple[jax.Array, jax.Array]]:
    """Return the mean eigenvalues, or the mean square, of a measurement and of its average."""
    if not isinstance(leaf, Kernel):
        return [(jnp.mean(new), jnp.mean(memory.second_moment))]
    rows, cols = leaf.rows.holding(memory.rows.factor), leaf.cols.holding(memory.cols.factor)
    return [(new.rows.mean(), rows.mean()), (new.cols.mean(), cols.mean())]


def _shares(new: jax.Array, total: jax.Array, trust: Trust) -> Shares:
    """Return what is left of measurements, and of the averages so far.

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
    return Shares(
        jnp.where(over, limit / jnp.where(over, new, 1), 1).astype(new.dtype),
        jnp.where(under, _PROPORTION * new / jnp.where(under, average, 1), 1).astype(new.dtype),
        over,
    )
