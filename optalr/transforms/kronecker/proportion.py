"""One batch must not own the statistics: measurements out of all proportion are scaled down.

A moving average gives each batch the share 1 − decay, 5 % by default. A batch whose loss is ten
thousand times as large has a hundred million times the second moment. It would rule the average for
hundreds of measurements, in which the steps would be close to zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.structured import Structured
from optalr.transforms.kronecker.leaves import Kernel
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


class Tamed(NamedTuple):
    """A kernel's statistics in proportion to their averages."""

    new: Measurement
    rows: Shares
    cols: Shares

    @property
    def over(self) -> jax.Array:
        """Whether anything of the batch was scaled down."""
        return jnp.any(self.rows.over) | jnp.any(self.cols.over)


def in_proportion(new: Measurement, leaf: Kernel, memory: LeafMemory, *, trust: Trust) -> Tamed:
    """Return a kernel's statistics, scaled down where they are too large.

    Args:
      new: what this batch shows.
      leaf: the kernel.
      memory: the averages without this batch.
      trust: what the averages are worth.
    """
    rows = _shares_of(new.rows, leaf.rows.holding(memory.rows.factor), trust)
    cols = _shares_of(new.cols, leaf.cols.holding(memory.cols.factor), trust)
    moments = new.second_moment
    if isinstance(moments, jax.Array):
        # Squares of a batch's gradient are out of proportion where its factors are. By themselves
        # they may be N times those of the factors, in a batch whose examples agree.
        moments = moments * spd.align(rows.new * cols.new, moments)
    tame = Measurement(new.rows.scaled(rows.new), new.cols.scaled(cols.new), moments)
    return Tamed(tame, rows, cols)


def shares(new: jax.Array, total: jax.Array, trust: Trust) -> Shares:
    """Return what is left of a measurement, and of the average so far.

    Args:
      new: mean eigenvalue, or mean square, of the measurement.
      total: that of the average, not corrected for its start at zero; 0 where nothing has been
        seen, which bounds nothing.
      trust: what the average is worth.
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


def _shares_of(new: Structured, kept: Structured, trust: Trust) -> Shares:
    return shares(new.mean(), kept.mean(), trust)
