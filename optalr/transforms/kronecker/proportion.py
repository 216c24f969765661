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


class Measurement(NamedTuple):
    """The statistics of one kernel in one batch."""

    rows: Structured
    cols: Structured
    second_moment: Any  # where one is kept


def in_proportion(
    new: Measurement, leaf: Kernel, memory: LeafMemory, *, weight: jax.Array
) -> tuple[Measurement, jax.Array]:
    """Return a kernel's statistics, scaled down where they are too large; and whether they were.

    Args:
      new: what this batch shows.
      leaf: the kernel.
      memory: the averages without this batch.
      weight: the sum of the averages' weights.
    """
    row_share, row_over = _share(new.rows, leaf.rows.holding(memory.rows.factor), weight)
    col_share, col_over = _share(new.cols, leaf.cols.holding(memory.cols.factor), weight)
    moments = new.second_moment
    if isinstance(moments, jax.Array):
        # Squares of a batch's gradient are out of proportion where its factors are. By themselves
        # they may be N times those of the factors, in a batch whose examples agree.
        moments = moments * spd.align(row_share * col_share, moments)
    tame = Measurement(new.rows.scaled(row_share), new.cols.scaled(col_share), moments)
    return tame, jnp.any(row_over) | jnp.any(col_over)


def share_in_proportion(new: jax.Array, average: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the share of a measurement that is in proportion, and whether that is less than 1.

    Args:
      new: mean eigenvalue, or mean square, of the measurement.
      average: that of the average so far; 0 where nothing has been seen, which bounds nothing.
    """
    limit = _PROPORTION * average
    over = (average > 0) & (new > limit) & jnp.isfinite(new)
    return jnp.where(over, limit / jnp.where(over, new, 1), 1).astype(new.dtype), over


def _share(new: Structured, kept: Structured, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    average = kept.mean() / jnp.where(weight > 0, weight, 1).astype(kept.stored.dtype)
    return share_in_proportion(new.mean(), average)
