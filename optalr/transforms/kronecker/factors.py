"""Arithmetic of one leaf's Kronecker factors: fold in statistics, take powers, apply them.

A side's matrix is stored whole, as a stack of diagonal blocks or as its diagonal (``Side``). Blocks
of a size that does not divide the side are padded; inside these functions a gradient matrix is
padded the same way, so that the eigenbasis of a padded block loses nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.moments import LayerMoments
from optalr.signals.storage import Side
from optalr.transforms.kronecker.leaves import LeafPlan, Source

Pair = tuple[jax.Array, jax.Array]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply (stacks of) matrices in full precision, which accelerators must be asked for."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def zeros(side: Side, stack: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return an empty factor."""
    return jnp.zeros((*stack, *side.shape), dtype)


def identity(side: Side, stack: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return the root that changes nothing."""
    if side.form == "diagonal":
        return jnp.ones((*stack, *side.shape), dtype)
    return jnp.broadcast_to(jnp.eye(side.block, dtype=dtype), (*stack, *side.shape)) + 0


def _padding(side: Side) -> int:
    return side.padded_size - side.size if side.form == "blocks" else 0


def pad(plan: LeafPlan, matrix: jax.Array) -> jax.Array:
    """Pad a ``(*stack, m, n)`` matrix with zeros to whole blocks."""
    widths = [(0, 0)] * len(plan.stack) + [(0, _padding(side)) for side in plan.sides]
    return jnp.pad(matrix, widths) if any(width for _, width in widths) else matrix


def unpad(plan: LeafPlan, matrix: jax.Array) -> jax.Array:
    """Undo ``pad``."""
    return matrix[..., : plan.rows.size, : plan.cols.size]


def from_gram(side: Side, gram: jax.Array) -> jax.Array:
    """Keep of a whole Gram matrix ``(*stack, m, m)`` what the side stores."""
    if side.form == "diagonal":
        return jnp.diagonal(gram, axis1=-2, axis2=-1)
    if side.form == "full":
        return gram
    extra = _padding(side)
    widths = [(0, 0)] * (gram.ndim - 2) + [(0, extra), (0, extra)]
    # Padded rows get the mean eigenvalue: they stay apart from the others and change no mean.
    mean = jnp.trace(gram, axis1=-2, axis2=-1) / side.size
    is_padding = (jnp.arange(side.size + extra) >= side.size).astype(gram.dtype)
    corner = jnp.broadcast_to(jnp.diag(is_padding), (*mean.shape, *(side.size + extra,) * 2))
    padded = jnp.pad(gram, widths) + mean[..., None, None] * corner
    blocks = padded.reshape(
        *gram.shape[:-2], side.num_blocks, side.block, side.num_blocks, side.block
    )
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def gram_of_rows(side: Side, matrix: jax.Array) -> jax.Array:
    """Return what the side stores of ``M Mᵀ`` for ``(*stack, m, n)``."""
    if side.form == "diagonal":
        return jnp.sum(jnp.square(matrix), -1)
    return from_gram(side, matmul(matrix, jnp.swapaxes(matrix, -1, -2)))


def signal_statistics(plan: LeafPlan, moments: LayerMoments, joint: bool) -> Pair:
    """Return the two factors of one captured layer, bias included where it is joint."""
    rows, cols = moments.rows, moments.cols
    if joint:
        if moments.row_mean is not None:
            rows = _homogeneous(rows, moments.row_mean)
        else:
            assert moments.col_mean is not None
            cols = _homogeneous(cols, moments.col_mean)
    return from_gram(plan.rows, rows), from_gram(plan.cols, cols)


def _homogeneous(gram: jax.Array, mean: jax.Array) -> jax.Array:
    """Return the Gram matrix of inputs with a 1 appended."""
    top = jnp.concatenate([gram, mean[..., :, None]], -1)
    bottom = jnp.concatenate([mean, jnp.ones_like(mean[..., :1])], -1)
    return jnp.concatenate([top, bottom[..., None, :]], -2)


def gradient_statistics(
    plan: LeafPlan, matrix: jax.Array, num_examples: jax.Array, normalize: bool
) -> Pair:
    """Return the Gram matrices of a gradient.

    With ``normalize`` their product estimates the Fisher matrix with the right trace,
    ``tr(B) tr(A) = N ‖G‖²``, so that each takes the whole power; without, they are Shampoo's.
    """
    left = gram_of_rows(plan.rows, matrix)
    right = gram_of_rows(plan.cols, jnp.swapaxes(matrix, -1, -2))
    if not normalize:
        return left, right
    total = jnp.sum(jnp.square(matrix), (-2, -1))
    inverse = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    input_is_rows = plan.output_side == 1
    scales = (inverse, num_examples) if input_is_rows else (num_examples, inverse)
    return (
        left * expand(scales[0], left.ndim),
        right * expand(scales[1], right.ndim),
    )


def expand(scalar: jax.Array, ndim: int) -> jax.Array:
    """Append axes of size 1 up to ``ndim``."""
    scalar = jnp.asarray(scalar)
    return scalar.reshape(scalar.shape + (1,) * (ndim - scalar.ndim))


def scaled(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return matrices over their largest entry, the Frobenius norms of these, and the entries.

    The squares of 1e20 are beyond float32, those of 1e-23 below it. Norms are ``(..., 1, 1)``.
    """
    largest = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True, initial=0)
    largest = jnp.where(largest == 0, 1, largest)
    small = matrix / largest
    return small, jnp.sqrt(jnp.sum(jnp.square(small), (-2, -1), keepdims=True)), largest


def norm(array: jax.Array) -> jax.Array:
    """Return the norm of all numbers of an array."""
    _, small, largest = scaled(array.reshape(1, -1))
    return (small * largest)[0, 0]


def mean_eigenvalue(plan: LeafPlan, which: int, factor: jax.Array) -> jax.Array:
    """Return the mean eigenvalue of a stored factor, ``(*stack,)``."""
    side = plan.sides[which]
    diagonal = factor if side.form == "diagonal" else jnp.diagonal(factor, axis1=-2, axis2=-1)
    return jnp.mean(diagonal, tuple(range(len(plan.stack), diagonal.ndim)))


def factor_dampings(
    plan: LeafPlan, rows: jax.Array, cols: jax.Array, damping: jax.Array, form: str
) -> Pair:
    """Return what is added to the eigenvalues of each factor, ``(*stack,)``."""
    means = mean_eigenvalue(plan, 0, rows), mean_eigenvalue(plan, 1, cols)
    damping = jnp.asarray(damping, rows.dtype)
    if form == "absolute":
        return jnp.broadcast_to(damping, means[0].shape), jnp.broadcast_to(damping, means[1].shape)
    alive = (means[0] > 0) & (means[1] > 0)
    if form == "relative":
        # A layer that has seen nothing has no scale: its root is the identity.
        row, col = (jnp.where(alive, damping * mean, 1) for mean in means)
        return row, col
    ratio = jnp.where(alive, means[0], 1) / jnp.where(alive, means[1], 1)
    pi = jnp.sqrt(ratio)
    root = jnp.sqrt(damping)
    return root * pi, root / pi


def apply_to_rows(side: Side, factor: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return ``factor @ matrix`` for what a side stores, ``matrix`` padded."""
    if side.form == "diagonal":
        return factor[..., :, None] * matrix
    if side.form == "full":
        return matmul(factor, matrix)
    blocks = matrix.reshape(*matrix.shape[:-2], side.num_blocks, side.block, matrix.shape[-1])
    return matmul(factor, blocks).reshape(matrix.shape)


def apply_both(plan: LeafPlan, rows: jax.Array, cols: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return ``rows @ matrix @ colsᵀ``."""
    matrix = apply_to_rows(plan.rows, rows, matrix)
    if plan.cols.form == "full":
        return matmul(matrix, jnp.swapaxes(cols, -1, -2))
    return jnp.swapaxes(apply_to_rows(plan.cols, cols, jnp.swapaxes(matrix, -1, -2)), -1, -2)


def transpose(side: Side, factor: jax.Array) -> jax.Array:
    """Transpose what a side stores."""
    return factor if side.form == "diagonal" else jnp.swapaxes(factor, -1, -2)


def flat_values(plan: LeafPlan, values: jax.Array) -> jax.Array:
    """Return a side's eigenvalues as ``(*stack, padded size)``."""
    return values.reshape(*plan.stack, -1)


def damped_power(values: jax.Array, damping: Any, power: Any) -> jax.Array:
    """Return ``(values + damping)^power``, and 1 where the base is not positive."""
    base = values + damping
    safe = jnp.where(base > 0, base, 1)
    return jnp.where(base > 0, jnp.power(safe, jnp.asarray(power, values.dtype)), 1)


def diagonal_update(
    grad: jax.Array, moment: jax.Array, damping: jax.Array, power: Any, form: str
) -> jax.Array:
    """Return ``(v + λ)^p g``, elementwise."""
    added = damping * jnp.mean(moment) if form == "relative" else damping
    return damped_power(moment, jnp.asarray(added, moment.dtype), power) * grad


def bias_factor(plan: LeafPlan, source: Source, pair: Pair) -> tuple[Side, jax.Array]:
    """Return the output side of a kernel and what it stores."""
    return plan.sides[source.output_side], pair[source.output_side]
