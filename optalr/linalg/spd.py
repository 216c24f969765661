"""What every method for roots of symmetric positive (semi)definite matrices shares.

A method works on a *normalized* matrix: finite, exactly symmetric, damped, and scaled so that its
largest entry lies in [1/2, 1). So neither 1e-20 nor 1e20 can overflow a square, in float32 either.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arguments import is_concrete
from optalr.arrays import wide_dtype

# TF32 or bfloat16 products destroy a root: the smallest eigenvalue is found by cancellation.
HIGHEST = jax.lax.Precision.HIGHEST
# Where no tolerance is asked for, a root is held to max(FLOOR, FACTOR · ε · condition).
TOLERANCE_FLOOR = 1e-4
TOLERANCE_FACTOR = 8.0


class Normalized(NamedTuple):
    """A damped matrix, ready for a method: ``matrix · 2^exponent`` is the original plus damping."""

    matrix: jax.Array  # (..., n, n), largest entry in [1/2, 1); the identity where not usable
    exponent: jax.Array  # (...) int32
    finite: jax.Array  # (...) bool
    usable: jax.Array  # (...) bool: finite, and not zero


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply (stacks of) matrices in full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def transpose(a: jax.Array) -> jax.Array:
    """Swap the last two axes."""
    return jnp.swapaxes(a, -1, -2)


def column(a: jax.Array) -> jax.Array:
    """Give a stack of scalars ``(...)`` the shape ``(..., 1, 1)`` of a stack of matrices."""
    return a[..., None, None]


def align(flag: jax.Array, array: jax.Array) -> jax.Array:
    """Give a stack of flags trailing axes of size one, as many as ``array`` has."""
    return flag.reshape(flag.shape + (1,) * (array.ndim - flag.ndim))


def identity_like(a: jax.Array) -> jax.Array:
    """Return identity matrices in the shape of ``a``."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


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
    if damping.ndim > len(batch):
        raise ValueError(
            f"{name} must be a number, or one a matrix in the leading dimensions {batch}, got "
            f"shape {damping.shape}."
        )
    try:
        return jnp.broadcast_to(damping, batch)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to the leading dimensions {batch}, got shape {damping.shape}."
        ) from None


def normalize(matrix: jax.Array, damping: jax.Array) -> Normalized:
    """Symmetrize, damp and scale each matrix of a stack; replace what has no root by identity."""
    eye = identity_like(matrix)
    finite = jnp.isfinite(matrix).all((-2, -1)) & jnp.isfinite(damping)
    matrix = jnp.where(column(finite), matrix, 0)
    damping = jnp.where(finite, damping, 0)
    largest = jnp.maximum(jnp.abs(matrix).max((-2, -1)), jnp.abs(damping))
    usable = finite & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    # Kept off the ends of the exponent's range, where ldexp would flush to zero or overflow.
    limit = jnp.finfo(matrix.dtype).maxexp - 2
    exponent = jnp.clip(exponent + 1, -limit, limit)
    down = jnp.ldexp(jnp.ones_like(damping), -exponent)
    half = matrix * column(down)
    damped = 0.5 * (half + transpose(half)) + column(damping * down) * eye
    return Normalized(jnp.where(column(usable), damped, eye), exponent, finite, usable)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return ``2^exponent`` for a fractional exponent, without the error of a large one."""
    whole = jnp.round(exponent)
    return jnp.ldexp(jnp.exp2(exponent - whole), whole.astype(jnp.int32))


def integer_power(matrix: jax.Array, power: int) -> jax.Array:
    """Return ``matrix`` to a whole ``power >= 1`` by repeated squaring."""
    if power == 1:
        return matrix
    half = integer_power(matmul(matrix, matrix), power // 2)
    return matmul(half, matrix) if power % 2 else half


def whole_number(p: Any) -> int | None:
    """Return ``p`` as an int if it is a concrete whole number, else None."""
    if not is_concrete(p):
        return None
    value = float(np.asarray(p))
    return int(value) if value.is_integer() else None


def root_residual(matrix: jax.Array, root: jax.Array, p: int) -> jax.Array:
    """Return ``‖X^⌊p/2⌋ A X^⌈p/2⌉ − I‖_F / √n``, for p = 2 that is ``‖XAX − I‖_F / √n``."""
    right = integer_power(root, (p + 1) // 2)
    product = matmul(matrix, right)
    if p > 1:
        left = integer_power(root, p // 2) if p % 2 else right
        product = matmul(left, product)
    return frobenius(product - identity_like(product))


def frobenius(matrix: jax.Array) -> jax.Array:
    """Return ``‖M‖_F / √n``."""
    n = matrix.shape[-1]
    # A product with ones instead of a plain sum: XLA's CPU backend (jax 0.10) merges a sum with the
    # two products before it into one kernel, ten times slower than they are apart.
    rows = matmul(jnp.square(matrix), jnp.ones((*matrix.shape[:-2], n, 1), matrix.dtype))
    return jnp.sqrt(jnp.sum(rows, (-2, -1)) / n)


def default_tolerance(condition: jax.Array) -> jax.Array:
    """Return ``max(1e-4, 8 ε κ)``: what rounding leaves within reach at this condition."""
    eps = jnp.finfo(condition.dtype).eps
    return jnp.maximum(TOLERANCE_FLOOR, TOLERANCE_FACTOR * eps * condition)
