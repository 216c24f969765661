"""How much memory measuring takes, counted from shapes."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.moments import Sides
from optalr.signals.tapping.capture import Tapped
from optalr.signals.tapping.gauge import Gauge, Kept
from optalr.signals.tracing.site import Operands


def measuring_bytes(tapped: Tapped, sides: Mapping[int, Sides]) -> dict[int, int]:
    """Return the bytes that measuring takes for each captured leaf.

    These are both sides of a product, laid out in rows (a convolution's patches among them) and in
    float32 or wider, and the sums in the shapes that are kept. Of several uses of a leaf the
    largest counts.

    Args:
      tapped: the loss, its layers and the sampling.
      sides: by leaf, what the method keeps, which is all that is measured of a layer that hands on
        its operands.
    """
    late, kept = tapped.measured_late(), tapped.kept()
    largest: dict[int, int] = {}
    for site in tapped.layers.sites:
        leaf = site.leaf
        asked = Kept.of(site, sides[leaf]) if leaf in late else kept[leaf]
        gauge = tapped.gauge(site, asked)
        taken = _laid_out_bytes(gauge) + sum(map(_nbytes, gauge.like))
        largest[leaf] = max(taken, largest.get(leaf, 0))
    return largest


def _laid_out_bytes(gauge: Gauge) -> int:
    """Return the bytes of the rows that are laid out at once."""
    pieces: list[int] = []

    def lay_out(operands: Operands, seed: jax.Array) -> Any:
        def measure(piece: Operands) -> Any:
            signals = gauge.site.signals(piece, (gauge.sampling, seed))
            size = signals.inputs.size + signals.outputs.size
            pieces.append(size * gauge.like.total.dtype.itemsize)
            return gauge.sums(piece, seed)

        return gauge.site.add_up(measure, operands, gauge.sampling)

    types = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gauge.site.operand_types())
    jax.eval_shape(lay_out, Operands(*types), jax.ShapeDtypeStruct((), jnp.uint32))
    return max(pieces)


def _nbytes(like: Any) -> int:
    return math.prod(like.shape) * like.dtype.itemsize
