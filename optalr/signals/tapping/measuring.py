"""What is measured of one layer: sums of Gram products over its positions, and when.

A layer's two sides, its input and its output's cotangent, are laid out by its site; here they
become sums. Where the two sides take less memory than their Gram matrices they can be handed on as
they are, and be measured after the backward pass (``Operands``).
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.tracing.compat import vary, varying_axes
from optalr.signals.tracing.sampling import Sampling, spread
from optalr.signals.tracing.sites import Site


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


class Operands(NamedTuple):
    """The two sides of a layer's only use, not yet measured.

    Fields:
      data: the product's other operand, in its own shape and dtype.
      cotangent: the cotangent of the product.
    """

    data: Any
    cotangent: Any


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
    data, _ = site.operands([var.aval for var in site.equation.invars])
    cotangent = site.equation.outvars[0].aval
    return Operands(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (data, cotangent)))


def operands_are_smaller(site: Site, leaf_shape: tuple[int, ...]) -> bool:
    """Whether the two sides of a site's product have fewer entries than their Gram matrices."""
    data, _ = site.operands([var.aval for var in site.equation.invars])
    cotangent = site.equation.outvars[0].aval
    if not jnp.issubdtype(data.dtype, jnp.floating) or varying_axes(data):
        return False
    stack, m, n = site.leaf_view.matrix_shape(leaf_shape)
    return data.size + cotangent.size < math.prod(stack) * (m * m + n * n)


def measure_if(flag: Any, site: Site, sampling: Sampling, operands: Operands, like: Sums) -> Sums:
    """Measure, or return zeros where a traced ``flag`` is off (only this sits in a ``cond``).

    Args:
      flag: None or a Python bool to measure always, else a traced bool.
      site: the layer's product.
      sampling: which examples and positions to look at.
      operands: the product's two sides.
      like: arrays, or shapes and dtypes, of the sums.
    """
    axes = varying_axes(jax.typeof(operands.cotangent))

    def skip(operands):
        del operands
        return jax.tree.map(lambda zero: vary(zero, axes), zeros_of(like))

    if flag is None:
        return measure(site, sampling, operands, like)
    return jax.lax.cond(flag, lambda both: measure(site, sampling, both, like), skip, operands)


def measure(site: Site, sampling: Sampling, operands: Operands, like: Sums) -> Sums:
    """Return a site's four sums, each an estimate of the sum over all positions."""
    data, cotangent = _only_once(operands)
    # Where a sample starts is hashed from the cotangent, so that it varies from step to step with
    # no key to pass. Of absolute values: a softmax's cotangents sum to zero.
    size = jnp.sum(jnp.abs(cotangent.astype(jnp.float32)))
    seed = jax.lax.bitcast_convert_type(size, jnp.uint32)
    dtype = like.total.dtype
    edges = site.piece_edges(data, cotangent, sampling)
    if edges is None:
        total = _sums(site, (data, cotangent), sampling, spread(seed), dtype)
    else:
        total = _sums_by_pieces(site, (data, cotangent), edges, sampling, spread(seed), dtype)
    axes = varying_axes(jax.typeof(cotangent))
    placed = _into_whole(site, total, like)
    return jax.tree.map(lambda x, shape: vary(x.reshape(shape.shape), axes), placed, like)


def _into_whole(site: Site, sums: Sums, like: Sums) -> Sums:
    """Place the sums of a part that was cut out of its leaf; the rest of the leaf saw zeros."""
    cut = site.view.cut
    if cut is None:
        return sums
    name = "inputs" if cut.axis in site.sides.inputs else "outputs"
    after = getattr(like, name).shape[-1] - cut.start - cut.size
    room = (cut.start, after)
    placed = {name: jnp.pad(getattr(sums, name), ((0, 0), room, room))}
    if name == "inputs":
        placed["mean"] = jnp.pad(sums.mean, ((0, 0), room))
    return sums._replace(**placed)


def _sums_by_pieces(
    site: Site, both: tuple[jax.Array, jax.Array], edges: list[int], sampling, seed, dtype
) -> Sums:
    """Add up the sums over pieces of the examples, one after the other in the same memory."""
    total: Sums | None = None
    for start, end in itertools.pairwise(edges):
        begin: Any = start
        if total is not None:
            # A piece must wait for the one before, or a scheduler lays them all out at once (the
            # CPU's does, and drops barriers first). Entries of a Gram diagonal are not negative.
            begin = start + (total.inputs[0, 0, 0] < 0)
        piece = site.piece(*both, begin, end - start)
        sums = _sums(site, piece, sampling, seed, dtype)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    assert total is not None
    return total


def _sums(site: Site, piece: tuple[jax.Array, jax.Array], sampling: Sampling, seed, dtype) -> Sums:
    """Compute the sums over one piece of the examples."""
    inputs, outputs, scale = site.signals(*piece, sampling, seed)
    inputs, outputs = inputs.astype(dtype), outputs.astype(dtype)
    return Sums(
        _gram(inputs) * (scale / site.groups),
        _gram(outputs) * scale,
        jnp.sum(inputs, axis=1) * (scale / site.groups),
        jnp.full(inputs.shape[0], outputs.shape[1] * scale, dtype),
    )


def _gram(rows: jax.Array) -> jax.Array:
    """Return ``Σ_r x_r x_rᵀ`` of ``(S, R, d)``, in full precision also where TF32 is default."""
    return jnp.einsum("srd,sre->sde", rows, rows, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _only_once(signals):
    """Pass signals on, and refuse to be differentiated: the sums are quadratic in them."""
    return signals


@_only_once.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "value_grad_and_extras cannot be differentiated while it captures signals: their Gram "
        "matrices are quadratic in the cotangent, so a second derivative through them would be "
        "wrong. Pass signals=False, or use the matvecs extras['hessian'] and "
        "extras['gauss_newton']."
    )
