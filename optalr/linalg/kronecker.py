"""Applying powers of a Kronecker-factored matrix, by its factors' roots or in their eigenbasis.

With column-stacking ``vec`` and symmetric factors, A for the rows and B for the columns of G,

    (B ⊗ A)^p vec(G) = vec(A^p G B^p)                     any p, and p may be traced
    (B ⊗ A + λI)^p vec(G) = vec(Q_A [(a bᵀ + λ)^p ∘ (Q_Aᵀ G Q_B)] Q_Bᵀ)

where ``A = Q_A diag(a) Q_Aᵀ`` and ``B = Q_B diag(b) Q_Bᵀ``. The second form damps the product
exactly. To damp each factor, ``(A + π√λ I)`` and ``(B + √λ/π I)``, adds cross terms. Everything
here takes stacks: leading dimensions are those of independent layers. A factor of ``None`` stands
for the identity, so one-sided preconditioners need no special case.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.arrays import at_least_float32
from optalr.linalg import spd
from optalr.linalg.roots.bases import EigenBasis
from optalr.linalg.roots.decompositions import floor_spectrum
from optalr.linalg.structured import Structured, as_structured

# A matrix, a stack of matrices, or a form that stores a part of each.
Factor = jax.Array | Structured


def apply_kronecker(matrix: jax.Array, left: Factor | None, right: Factor | None) -> jax.Array:
    """Return ``left · G · right``, which is ``(right ⊗ left) vec(G)`` for symmetric factors.

    Choose it to apply ready-made roots. Cost: two products, ``2mn(m + n)`` flops per matrix.

    Args:
      matrix: ``(..., m, n)``, the gradient's matrix view.
      left: ``(..., m, m)``, for instance ``A^{-1/2}``; None for the identity. It may be one of the
        forms of ``optalr.linalg.structured``.
      right: ``(..., n, n)``, for instance ``B^{-1/2}``; None for the identity.

    Returns:
      ``(..., m, n)``, in the widest dtype of the three and at least float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import apply_kronecker
      >>> apply_kronecker(jnp.ones((2, 1)), jnp.diag(jnp.array([2.0, 3.0])), None).tolist()
      [[2.0], [3.0]]
    """
    product = at_least_float32(matrix)
    if left is not None:
        product = as_structured(left) @ product
    if right is not None:
        product = product @ as_structured(right)
    return product


def to_eigenbasis(matrix: jax.Array, left: Factor | None, right: Factor | None) -> jax.Array:
    """Return ``Q_Aᵀ G Q_B``, the coordinates of G in the factors' eigenbases.

    Choose it to work on coordinates, for instance to average their squares. Cost: two products.

    Args:
      matrix: G, shape (..., m, n).
      left: Q_A, the eigenvectors of the left factor, shape (..., m, m); None for the identity.
      right: Q_B, those of the right factor, shape (..., n, n); None for the identity.

    Returns:
      The coordinates, shape (..., m, n).

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import to_eigenbasis
      >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> to_eigenbasis(jnp.array([[1.0], [5.0]]), swap, None).tolist()
      [[5.0], [1.0]]
    """
    return apply_kronecker(matrix, None if left is None else as_structured(left).T, right)


def from_eigenbasis(matrix: jax.Array, left: Factor | None, right: Factor | None) -> jax.Array:
    """Return ``Q_A G Q_Bᵀ``, which undoes ``to_eigenbasis``.

    Choose it for the way back to the parameters' coordinates. Cost: two products.

    Args:
      matrix: G in eigenbases, shape (..., m, n).
      left: Q_A, shape (..., m, m); None for the identity.
      right: Q_B, shape (..., n, n); None for the identity.

    Returns:
      The matrix in the coordinates of the parameters, shape (..., m, n).

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import eigenbasis, from_eigenbasis, to_eigenbasis
      >>> q = eigenbasis(jnp.array([[2.0, 1.0], [1.0, 2.0]])).vectors
      >>> g = jnp.array([[1.0], [5.0]])
      >>> bool(jnp.allclose(from_eigenbasis(to_eigenbasis(g, q, None), q, None), g, atol=1e-5))
      True
    """
    return apply_kronecker(matrix, left, None if right is None else as_structured(right).T)


def eigenbasis_power(
    left: jax.Array | None, right: jax.Array | None, power: Any, damping: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Return ``(a bᵀ + λ)^p`` as a pair: an array of moderate numbers, and their common factor.

    Choose it where you apply the gains to coordinates yourself; else ``apply_eigenbasis_power``.

    Args:
      left: ``(..., m)`` eigenvalues of A, or None for ones.
      right: ``(..., n)`` eigenvalues of B, or None for ones; not both.
      power: p, any real number; it may be traced.
      damping: λ >= 0, absolute; one number, or one per matrix of the stack.

    Returns:
      ``(relative, factor)`` of shapes ``(..., m, n)`` and ``(..., 1, 1)``; their product is the
      power. They come apart because ``a bᵀ`` itself leaves float32's range for tiny or huge
      factors. Eigenvalues below ε times the largest of their factor are raised to that. Where all
      of ``a bᵀ + λ`` vanishes, ``relative`` is zero.

    Raises:
      ValueError: both sides are None.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import eigenbasis_power
      >>> a, b = jnp.array([4.0, 1.0]), jnp.array([1.0, 9.0])
      >>> relative, factor = eigenbasis_power(a, b, -0.5)
      >>> relative.shape, factor.shape
      ((2, 2), (1, 1))
      >>> bool(jnp.allclose(relative * factor, jnp.array([[1 / 2, 1 / 6], [1, 1 / 3]])))
      True
    """
    if left is None and right is None:
        raise ValueError("left and right must not both be None: there is nothing to apply.")
    dtype = jnp.result_type(*(values for values in (left, right) if values is not None))
    relative_left, log_left = _relative_spectrum(left, dtype)
    relative_right, log_right = _relative_spectrum(right, dtype)
    relative = relative_left[..., :, None] * relative_right[..., None, :]
    log_product = log_left + log_right
    log_damping = jnp.log(jnp.broadcast_to(jnp.asarray(damping, dtype), log_product.shape))
    largest = jnp.maximum(log_product, log_damping)
    zero = jnp.isneginf(largest)
    largest = jnp.where(zero, 0, largest)
    relative = relative * spd.column(jnp.exp(log_product - largest))
    relative = relative + spd.column(jnp.exp(log_damping - largest))
    power = jnp.asarray(power, dtype)
    powered = jnp.power(jnp.where(relative > 0, relative, 1), power)
    return jnp.where(relative > 0, powered, 0), spd.column(jnp.exp(power * largest))


def _relative_spectrum(values: jax.Array | None, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues over the largest, floored, and the logarithm of the largest."""
    if values is None:
        return jnp.ones((1,), dtype), jnp.zeros((), dtype)
    values = floor_spectrum(values)
    largest = jnp.max(values, -1)
    divisor = jnp.where(largest > 0, largest, 1)
    return values / divisor[..., None], jnp.log(largest)


@jax.jit
def apply_eigenbasis_power(
    matrix: jax.Array,
    left: EigenBasis | None,
    right: EigenBasis | None,
    power: Any,
    damping: Any = 0.0,
) -> jax.Array:
    """Return ``(B ⊗ A + λI)^p vec(G)`` with exact damping, as a matrix.

    Choose it where the damping should act on the product ``B ⊗ A`` itself, or where the power is
    traced. Cost: four products, where ``apply_kronecker`` with ready-made roots takes two.

    Args:
      matrix: ``(..., m, n)``, the gradient's matrix view G.
      left: the eigenbasis of A ``(m, m)``, or None for the identity.
      right: the eigenbasis of B ``(n, n)``, or None for the identity; not both.
      power: p, any real number; it may be traced.
      damping: λ >= 0, absolute; one number, or one per matrix of the stack.

    Returns:
      ``(..., m, n)``. Zeros where ``B ⊗ A + λI`` is zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import apply_eigenbasis_power, eigenbasis
      >>> a, b = eigenbasis(jnp.diag(jnp.array([4.0, 1.0]))), eigenbasis(jnp.diag(jnp.array([4.0])))
      >>> apply_eigenbasis_power(jnp.ones((2, 1)), a, b, -0.5).tolist()
      [[0.25], [0.5]]

    Reference: George et al. 2018, "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", section 3, with any power instead of −1.
    """
    relative, factor = eigenbasis_power(
        None if left is None else left.values,
        None if right is None else right.values,
        power,
        damping,
    )
    bases = (None if left is None else left.vectors, None if right is None else right.vectors)
    coordinates = to_eigenbasis(matrix, *bases)
    return from_eigenbasis(coordinates * relative * factor, *bases)


def mean_eigenvalue(matrix: Factor) -> jax.Array:
    """Return ``tr(A)/n`` of each matrix in a stack, the unit of a relative damping.

    Choose it to make a damping follow the scale of its matrix.

    Args:
      matrix: A, shape (..., n, n).

    Returns:
      The means, shape (...).

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import mean_eigenvalue
      >>> float(mean_eigenvalue(jnp.diag(jnp.array([1.0, 5.0]))))
      3.0
    """
    return as_structured(matrix).mean()


@jax.jit
def split_damping(left: Factor, right: Factor, damping: Any) -> tuple[jax.Array, jax.Array]:
    """Split the damping λ of ``B ⊗ A`` between the factors, into ``(π√λ, √λ/π)``.

    Choose it where each factor is damped and rooted alone, but λ is meant for their product. With
    ``π² = (tr(A)/m) / (tr(B)/n)`` the split minimizes (a bound on) the cross terms that damping
    each factor adds to ``B ⊗ A + λI``.

    Args:
      left: ``(..., m, m)``, A.
      right: ``(..., n, n)``, B.
      damping: λ >= 0 of the product; one number, or one per matrix of the stack.

    Returns:
      The damping of A and that of B; their product is λ. π is 1 where a trace is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import split_damping
      >>> a, b = split_damping(4 * jnp.eye(2), jnp.eye(3), 1e-2)
      >>> bool(jnp.isclose(a, 0.2)), bool(jnp.isclose(b, 0.05))
      (True, True)

    Reference: Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature", section 6.3.
    """
    return spd.split_damping_by_means(mean_eigenvalue(left), mean_eigenvalue(right), damping)
