"""Stacks of symmetric positive (semi)definite matrices, and what methods for their roots share.

A method works on a *normalized* matrix: finite, exactly symmetric, damped, and scaled so that its
largest entry lies in [1/2, 1). So neither 1e-20 nor 1e20 can overflow a square, in float32 either.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arrays import power_of_two_below, wide_dtype

# TF32 or bfloat16 products destroy a root: the smallest eigenvalue is found by cancellation.
HIGHEST = jax.lax.Precision.HIGHEST


class Normalized(NamedTuple):
    """Damped stacks, ready for a method: ``matrix · unit`` is the original plus damping.

    What there is one number a matrix of stands in one vector for the matrices of all stacks, so
    that programs have few operations on numbers.
    """

    stacks: list[jax.Array]  # each (k, n, n), largest entry in [1/2, 1); the identity if not usable
    unit: jax.Array  # (K,), a power of two
    finite: jax.Array  # (K,) bool
    usable: jax.Array  # (K,) bool: finite, and not zero


class RootTask(NamedTuple):
    """Normalized stacks, K matrices in all, and which root of them to take."""

    stacks: Sequence[jax.Array]  # each (k, n, n)
    power: Any  # p: an int where it is whole, a float, or (K,) where it is traced
    order: int  # of the coupled Newton iteration
    bases: Sequence[jax.Array]  # each (k, n, n), for methods that start from one; else none
    on_cpu: bool | None = None  # whether the program at hand is for CPUs; None for any device


class MethodResult(NamedTuple):
    """What a method returns for normalized stacks."""

    roots: list[jax.Array]  # each (k, n, n)
    residual: jax.Array  # (K,)
    condition: jax.Array  # (K,), λ_max/λ_min, at most 1/ε
    num_steps: jax.Array  # (K,) int32
    bases: list[jax.Array] | None = None  # each (k, n, n), where the method keeps them


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply (stacks of) matrices in full precision."""
    return _products(a, b, HIGHEST)


def quick_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply (stacks of) matrices as precisely as the program's other products.

    That is what ``jax.default_matmul_precision`` says; by default TF32 on a GPU and bfloat16 on a
    TPU. It is for what is made from a gradient, which came from such products itself.
    """
    return _products(a, b, None)


def _products(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    if min(a.ndim, b.ndim) < 2 or a.shape[:-2] != b.shape[:-2] or a.dtype != b.dtype:
        return jnp.matmul(a, b, precision=precision)
    # One operation, where jnp.matmul has four for a stack of one matrix.
    lead = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 1,), (b.ndim - 2,)), (lead, lead))
    return jax.lax.dot_general(a, b, dimensions, precision=precision)


def transpose(a: jax.Array) -> jax.Array:
    """Swap the last two axes."""
    return jnp.swapaxes(a, -1, -2)


def symmetric_part(a: jax.Array) -> jax.Array:
    """Return ``(A + Aᵀ)/2``, without what rounding left of asymmetry."""
    return 0.5 * (a + transpose(a))


def column(a: jax.Array) -> jax.Array:
    """Give a stack of scalars ``(...)`` the shape ``(..., 1, 1)`` of a stack of matrices."""
    return a[..., None, None]


def columns(numbers: jax.Array, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Return each stack's part of one number a matrix, ``(k, 1, 1)``."""
    return split(column(numbers), stacks)


def split(numbers: jax.Array, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Return each stack's part of an array that has one entry a matrix, along its first axis."""
    ends = np.cumsum([stack.shape[0] for stack in stacks])
    return jnp.split(numbers, ends[:-1]) if len(stacks) > 1 else [numbers]


def join(parts: Sequence[jax.Array]) -> jax.Array:
    """Undo ``split``."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def with_ones(gram: jax.Array, mean: jax.Array) -> jax.Array:
    """Return the mean of ``x xᵀ`` for vectors with a 1 appended, from theirs and their mean."""
    top = jnp.concatenate([gram, mean[..., :, None]], -1)
    bottom = jnp.concatenate([mean, jnp.ones_like(mean[..., :1])], -1)
    return jnp.concatenate([top, bottom[..., None, :]], -2)


def align(flag: jax.Array, array: jax.Array) -> jax.Array:
    """Give a stack of flags trailing axes of size one, as many as ``array`` has; a scalar none."""
    if flag.ndim == 0:
        return flag
    return flag.reshape(flag.shape + (1,) * (array.ndim - flag.ndim))


def identity_like(a: jax.Array) -> jax.Array:
    """Return identity matrices in the shape of ``a``."""
    rows, cols = (jax.lax.broadcasted_iota(jnp.int32, a.shape, a.ndim - axis) for axis in (2, 1))
    return (rows == cols).astype(a.dtype)


def as_square_stack(name: str, matrix: Any) -> jax.Array:
    """Return ``matrix`` as a float32 or float64 stack of square matrices, or say what is wrong."""
    array = jnp.asarray(matrix)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        raise ValueError(
            f"{name} must be a square matrix or a stack of them, (..., n, n), got shape "
            f"{array.shape}."
        )
    if array.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one row, got shape {array.shape}.")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real, got {array.dtype}. Take its real part.")
    # bfloat16, float16 and whole numbers are worked on, and answered, in float32.
    return array.astype(wide_dtype(array))


def broadcast_damping(name: str, damping: Any, matrix: jax.Array) -> jax.Array:
    """Return ``damping`` with one number a matrix of the stack."""
    damping = jnp.asarray(damping, matrix.dtype)
    batch = matrix.shape[:-2]
    try:
        return jnp.broadcast_to(damping, batch)
    except ValueError:
        raise ValueError(
            f"{name} must be a number, or one a matrix in the leading dimensions {batch}, got "
            f"shape {damping.shape}."
        ) from None


def broadcast_basis(basis: Any, matrix: jax.Array) -> jax.Array:
    """Return a basis for each matrix, or raise if it has not as many rows and columns."""
    basis = jnp.asarray(basis)
    fits = basis.ndim >= 2 and basis.shape[-2:] == matrix.shape[-2:]
    if not fits or basis.shape[:-2] not in ((), matrix.shape[:-2]):
        raise ValueError(
            f"basis must have the shape of the matrices, {matrix.shape}, got {basis.shape}."
        )
    return jnp.broadcast_to(basis, matrix.shape)


def split_damping_by_means(
    left: jax.Array, right: jax.Array, damping: Any
) -> tuple[jax.Array, jax.Array]:
    """Split the damping as ``split_damping`` does, given the factors' mean eigenvalues."""
    positive = (left > 0) & (right > 0)
    root_left = jnp.sqrt(jnp.where(positive, left, 1))
    root_right = jnp.sqrt(jnp.where(positive, right, 1))
    root = jnp.sqrt(jnp.asarray(damping, root_left.dtype))
    return root * (root_left / root_right), root * (root_right / root_left)


def normalize(
    stacks: Sequence[jax.Array], damping: jax.Array, scale: jax.Array | None = None
) -> Normalized:
    """Symmetrize, damp and scale each matrix; replace what has no root by identity.

    Args:
      stacks: each ``(k, n, n)``, all of one dtype.
      damping: ``(K,)``, one number a matrix.
      scale: ``(K,)``, what the matrices are to be multiplied by first; None for 1.
    """
    # What is not finite makes the largest entry not finite.
    entries = join([jnp.max(jnp.abs(stack), (-2, -1)) for stack in stacks])
    entries = entries if scale is None else entries * scale
    largest = jnp.maximum(entries, jnp.abs(damping))
    finite = jnp.isfinite(largest)
    usable = finite & (largest > 0)
    # Kept off the ends of the exponent's range, where a quotient would overflow or be flushed to
    # zero. Where a NaN stands the matrix is not used.
    info = jnp.finfo(damping.dtype)
    least, most = (np.array(2.0**e, damping.dtype) for e in (info.minexp + 2, info.maxexp - 2))
    unit = jax.lax.clamp(least, 4 * power_of_two_below(largest), most)
    inverse = 1 / unit
    added = columns(damping * inverse, stacks)
    # Half of it, for the sum of the matrix and its transpose.
    halves = columns(0.5 * inverse * (1 if scale is None else scale), stacks)

    def ready(stack: jax.Array, usable: Any, half: jax.Array, added: jax.Array) -> jax.Array:
        eye, scaled = identity_like(stack), stack * half
        return jnp.where(usable, scaled + transpose(scaled) + added * eye, eye)

    each = map(ready, stacks, columns(usable, stacks), halves, added)
    return Normalized(list(each), unit, finite, usable)


def inverse_root_of_unit(unit: jax.Array, p: Any) -> jax.Array:
    """Return ``unit^{-1/p}`` of a power of two, without the error of a large exponent."""
    if isinstance(p, int) and p & (p - 1) == 0:
        root = 1 / unit
        while p > 1:
            root, p = jnp.sqrt(root), p // 2
        return root
    exponent = -jnp.round(jnp.log2(unit)) / p
    whole = jnp.round(exponent)
    return jnp.ldexp(jnp.exp2(exponent - whole), whole.astype(jnp.int32))


def integer_power(matrix: jax.Array, power: int) -> jax.Array:
    """Return ``matrix`` to a whole ``power >= 1`` by repeated squaring."""
    if power == 1:
        return matrix
    half = integer_power(matmul(matrix, matrix), power // 2)
    return matmul(half, matrix) if power % 2 else half


def root_residuals(stacks: Sequence[jax.Array], roots: Sequence[jax.Array], p: int) -> jax.Array:
    """Return ``‖X^⌊p/2⌋ A X^⌈p/2⌉ − I‖_F / √n``, for p = 2 that is ``‖XAX − I‖_F / √n``."""

    def error(matrix: jax.Array, root: jax.Array) -> jax.Array:
        right = integer_power(root, (p + 1) // 2)
        product = matmul(matrix, right)
        if p > 1:
            left = integer_power(root, p // 2) if p % 2 else right
            product = matmul(left, product)
        return product - identity_like(product)

    return frobenius(list(map(error, stacks, roots)))


def frobenius(stacks: Sequence[jax.Array]) -> jax.Array:
    """Return ``‖M‖_F / √n`` of each matrix, ``(K,)``."""
    # A product with ones instead of a plain sum: XLA's CPU backend (jax 0.10) merges a sum with the
    # two products before it into one kernel, ten times slower than they are apart. One product that
    # sums over both axes costs a step of an MLP 5 MB more in temporary memory (of 31).
    ones = [jnp.ones((*stack.shape[:-1], 1), stack.dtype) for stack in stacks]
    rows = [matmul(jnp.square(stack), one) for stack, one in zip(stacks, ones, strict=True)]
    sizes = np.concatenate([np.full(s.shape[0], s.shape[-1], s.dtype) for s in stacks])
    return jnp.sqrt(join([jnp.sum(each, (-2, -1)) for each in rows]) / sizes)
