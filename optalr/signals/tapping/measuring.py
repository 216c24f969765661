"""What is measured of one layer: sums of Gram products over its positions, and when.

In: a layer's two sides, its input and its output's cotangent (``Operands``), which its site lays
out as rows. Out: their ``Sums``. Where the two sides take less memory than their Gram matrices they
can be handed on as they are, and be measured after the backward pass.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.tracing.compat import vary, varying_axes
from optalr.signals.tracing.sampling import Sampling, spread
from optalr.signals.tracing.sites.site import Operands, Site


class Sums(NamedTuple):
    """Sums over all positions of all uses of one leaf, not yet divided by their number.

    With ``stack`` the sizes of the leaf's stacked axes:

      inputs:  ``(*stack, m, m)`` Σ α αᵀ, averaged over a convolution's groups
      outputs: ``(*stack, n, n)`` Σ c cᵀ over cotangents c of the layer's output
      mean:    ``(*stack, m)``    Σ α
      total:   ``(*stack,)``      the number of positions, NT
    """

    inputs: Any
    outputs: Any
    mean: Any
    total: Any


# What a slot holds: zeros before the backward pass, then what was measured or is to be.
Dummies = Sums | Operands


def sums_like(site: Site, leaf_shape: tuple[int, ...], dtype: Any) -> Sums:
    """Return the shapes and dtypes of what is summed for a leaf that ``site`` taps."""
    view = site.leaf_view
    stack, m, n = view.matrix_shape(leaf_shape)
    if view.input_side == "cols":
        m, n = n, m
    shapes = ((*stack, m, m), (*stack, n, n), (*stack, m), stack)
    return Sums(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def zeros_of(like: Any) -> Any:
    """Return zeros in place of shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)


def operands_like(site: Site) -> Operands:
    """Return the shapes and dtypes of the two sides of a site's product."""
    return Operands(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in site.operand_types()))


def operands_are_smaller(site: Site, leaf_shape: tuple[int, ...]) -> bool:
    """Return whether a product's two sides have fewer entries than their Gram matrices."""
    data, cotangent = site.operand_types()
    # Cotangents of integers have a dtype of their own, and operands that differ between devices
    # cannot leave the shard_map by a dummy that is the same on all of them.
    if not jnp.issubdtype(data.dtype, jnp.floating) or varying_axes(data):
        return False
    stack, m, n = site.leaf_view.matrix_shape(leaf_shape)
    return data.size + cotangent.size < math.prod(stack) * (m * m + n * n)


@dataclasses.dataclass(frozen=True)
class Gauge:
    """How one site is measured.

    Attributes:
      site: the layer's product.
      sampling: which examples and positions to look at.
      like: arrays, or shapes and dtypes, of the sums.
    """

    site: Site
    sampling: Sampling
    like: Sums

    def read_if(self, flag: jax.Array | None, operands: Operands) -> Sums:
        """Measure, or return zeros where a traced ``flag`` is off; None measures always."""
        if flag is None:
            return self.read(operands)
        axes = varying_axes(jax.typeof(operands.cotangent))

        def skip(operands: Operands) -> Sums:
            del operands
            # Both branches of a cond must vary over the same mesh axes.
            return jax.tree.map(lambda zero: vary(zero, axes), zeros_of(self.like))

        # Nothing but the Gram products sits in the cond. On a CPU, XLA runs the gradient of a
        # convolution inside a cond (or a loop) many times slower than outside.
        return jax.lax.cond(flag, self.read, skip, operands)

    def read(self, operands: Operands) -> Sums:
        """Return the site's four sums, each an estimate of the sum over all positions."""
        operands = _refuse_derivatives(operands)
        # Where a sample starts is hashed from the cotangent, so that it varies from step to step
        # with no key to pass. Of absolute values: a softmax's cotangents sum to zero.
        size = jnp.sum(jnp.abs(operands.cotangent.astype(jnp.float32)))
        seed = spread(jax.lax.bitcast_convert_type(size, jnp.uint32))
        total = self._sums_by_pieces(operands, seed)
        axes = varying_axes(jax.typeof(operands.cotangent))
        placed = self._place_in_leaf(total)
        # A site stacks the layers of a vmap in one axis. The leaf may have several, or none.
        return jax.tree.map(lambda x, shape: vary(x.reshape(shape.shape), axes), placed, self.like)

    def _sums_by_pieces(self, operands: Operands, seed: jax.Array) -> Sums:
        """Add up the sums over pieces of the examples, one after the other in the same memory."""
        edges = self.site.piece_edges(operands, self.sampling)
        if not edges:
            return self._sums(operands, seed)
        spans = list(itertools.pairwise(edges))
        first_start, first_end = spans[0]
        first = self.site.piece(operands, first_start, first_end - first_start)
        total = self._sums(first, seed)
        for start, end in spans[1:]:
            # A piece must wait for the one before, or a scheduler lays them all out at once (the
            # CPU's does, and drops barriers first). Entries of a Gram diagonal are not negative,
            # so the start stays what it is, but not so that the compiler could tell.
            begin = start + (total.inputs[0, 0, 0] < 0)
            piece = self.site.piece(operands, begin, end - start)
            total = jax.tree.map(jnp.add, total, self._sums(piece, seed))
        return total

    def _sums(self, piece: Operands, seed: jax.Array) -> Sums:
        """Compute the sums over one piece of the examples."""
        dtype = self.like.total.dtype
        inputs, outputs, scale = self.site.signals(piece, (self.sampling, seed))
        inputs, outputs = inputs.astype(dtype), outputs.astype(dtype)
        # Groups of a convolution are further rows of the inputs, but no further positions.
        per_group = scale / self.site.groups
        return Sums(
            _gram(inputs) * per_group,
            _gram(outputs) * scale,
            jnp.sum(inputs, axis=1) * per_group,
            jnp.full(inputs.shape[0], outputs.shape[1] * scale, dtype),
        )

    def _place_in_leaf(self, sums: Sums) -> Sums:
        """Place the sums of a part that was cut out of its leaf; the rest of the leaf saw zeros."""
        cut = self.site.view.cut
        if cut is None:
            return sums
        if cut.axis in self.site.sides.inputs:
            room = _room(cut.start, cut.size, self.like.inputs.shape[-1])
            return sums._replace(
                inputs=jnp.pad(sums.inputs, ((0, 0), room, room)),
                mean=jnp.pad(sums.mean, ((0, 0), room)),
            )
        room = _room(cut.start, cut.size, self.like.outputs.shape[-1])
        return sums._replace(outputs=jnp.pad(sums.outputs, ((0, 0), room, room)))


def _room(start: int, size: int, whole: int) -> tuple[int, int]:
    """Return how many entries come before a part and after it."""
    return start, whole - start - size


def _gram(rows: jax.Array) -> jax.Array:
    """Return ``Σ_r x_r x_rᵀ`` of ``(S, R, d)``, in full precision also where TF32 is default."""
    return jnp.einsum("srd,sre->sde", rows, rows, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _refuse_derivatives(signals):
    """Pass signals on, and refuse to be differentiated: the sums are quadratic in them."""
    return signals


@_refuse_derivatives.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "value_grad_and_extras cannot be differentiated while it captures signals: their Gram "
        "matrices are quadratic in the cotangent, so a second derivative through them would be "
        "wrong. Pass signals=False, or use the matvecs extras['hessian'] and "
        "extras['gauss_newton']."
    )
