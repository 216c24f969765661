"""What measuring takes, in memory and in flops, counted from shapes."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.moments import Sides
from optalr.signals.tapping.budget import Cost, gradient_flops
from optalr.signals.tapping.capture import Tapped
from optalr.signals.tapping.gauge import Gauge, Kept
from optalr.signals.tracing.site import Operands


class Effort(NamedTuple):
    """What measuring one leaf takes.

    Fields:
      nbytes: both sides of its product, laid out in rows (a convolution's patches among them) and
        in float32 or wider, and the sums in the shapes that are kept. Of several uses the largest
        counts.
      flops: of the Gram matrices, of all uses.
      share: which part of the examples and positions is looked at.
    """

    nbytes: int = 0
    flops: float = 0.0
    share: float = 0.0


def efforts(tapped: Tapped, sides: Mapping[int, Sides]) -> dict[int, Effort]:
    """Return what measuring each captured leaf takes.

    Args:
      tapped: the loss, its layers and the sampling.
      sides: by leaf, what the method keeps, which is all that is measured of a layer that hands on
        its operands.
    """
    late = tapped.measured_late()
    found: dict[int, Effort] = {}
    for site in tapped.layers.sites:
        leaf = site.leaf
        gauge = tapped.gauge(site)
        if leaf in late:
            gauge = gauge.keeping(Kept.of(site, sides[leaf]))
        taken = _laid_out_bytes(gauge) + sum(map(_nbytes, gauge.like))
        cost, before = Cost.of(site, gauge.kept), found.get(leaf, Effort())
        found[leaf] = Effort(
            nbytes=max(taken, before.nbytes),
            flops=before.flops + gauge.share * cost.per_row * cost.rows,
            share=gauge.share,
        )
    return found


def layer_gradient_flops(tapped: Tapped) -> float:
    """Return the flops of the products of all layers, and of their derivatives."""
    kept = tapped.kept()
    costs = [Cost.of(site, kept[site.leaf]) for site in tapped.layers.sites]
    return gradient_flops(costs) if costs else 0.0


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
