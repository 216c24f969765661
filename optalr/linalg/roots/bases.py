"""Eigenbases of symmetric matrices: computing and refreshing them.

A basis is kept between steps because it moves slowly. One QR step refreshes it and saves a new
decomposition.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.roots.decompositions import diagonal_in, eigh, orthogonal_step


class EigenBasis(NamedTuple):
    """An orthonormal basis, and the matrix's diagonal in it.

    Attributes:
      vectors: ``(..., n, n)``, one basis vector a column; the identity where the matrix was not
        finite.
      values: ``(..., n)``, ``diag(Qᵀ A Q)``; zeros where the matrix was not finite.
      residual: ``(...)``, ``‖AQ − Q diag(values)‖_F / ‖A‖_F``: about ε for a full
        eigendecomposition, larger for a basis that was only refreshed; infinite where the matrix
        was not finite (keep the last good basis there), never NaN.
    """

    vectors: jax.Array
    values: jax.Array
    residual: jax.Array


@jax.jit
def eigenbasis(matrix: Any) -> EigenBasis:
    """Compute the full eigendecomposition of each symmetric matrix in a stack.

    Choose it to start a basis that ``refresh_eigenbasis`` then keeps up to date.

    Args:
      matrix: ``(..., n, n)``, symmetric; only its symmetric part counts.

    Returns:
      An ``EigenBasis``, values ascending.

    Raises:
      TypeError: the matrix is complex.
      ValueError: ``matrix`` is not square.

    Cost: an eigendecomposition and one product of n×n matrices.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import eigenbasis
      >>> eigenbasis(jnp.diag(jnp.array([3.0, 1.0]))).values.tolist()
      [1.0, 3.0]
    """
    matrix = spd.as_square_stack("matrix", matrix)
    normalized = spd.normalize(matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    values, vectors = eigh(normalized.matrix)
    image = spd.matmul(normalized.matrix, vectors)
    return _judge(normalized, image, vectors=vectors, values=values)


@jax.jit
def refresh_eigenbasis(matrix: Any, vectors: jax.Array) -> EigenBasis:
    """Improve an eigenbasis by one step of orthogonal iteration, ``Q ← qr(A Q)``.

    Choose it where a matrix has moved a little since its last decomposition: a QR and two products
    cost a fraction of an eigendecomposition on an accelerator. The columns are first sorted by
    falling ``diag(QᵀAQ)``, so that the leading ones act as power iteration and the trailing ones as
    inverse iteration. The order of the columns may therefore change between calls;
    ``carry_second_moments`` follows it.

    Args:
      matrix: ``(..., n, n)``, symmetric positive semidefinite.
      vectors: ``(..., n, n)``, the basis to start from, orthonormal.

    Returns:
      An ``EigenBasis`` whose ``residual`` says how far from diagonal the matrix still is.

    Raises:
      TypeError: the matrix is complex.
      ValueError: ``matrix`` is not square.

    Cost: 4 n³ flops for the products and about 4 n³ for the QR.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import eigenbasis, refresh_eigenbasis
      >>> a = jnp.array([[2.0, 0.5], [0.5, 1.0]])
      >>> start = eigenbasis(a).vectors
      >>> moved = a + jnp.array([[0.0, 0.1], [0.1, 0.0]])
      >>> stale = jnp.abs((start.T @ moved @ start)[0, 1])
      >>> fresh = refresh_eigenbasis(moved, start).vectors
      >>> bool(jnp.abs((fresh.T @ moved @ fresh)[0, 1]) < 0.5 * stale)
      True

    Reference: the refresh of Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using
    Adam", algorithm 4.
    """
    matrix = spd.as_square_stack("matrix", matrix)
    vectors = jnp.asarray(vectors, matrix.dtype)
    normalized = spd.normalize(matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    vectors = orthogonal_step(normalized.matrix, vectors)
    image = spd.matmul(normalized.matrix, vectors)
    return _judge(normalized, image, vectors=vectors, values=diagonal_in(vectors, image))


def _judge(
    normalized: spd.Normalized, image: jax.Array, *, vectors: jax.Array, values: jax.Array
) -> EigenBasis:
    """Return the basis with the scaling undone and nothing left that is not finite."""
    error = spd.frobenius(image - vectors * values[..., None, :])
    residual = error / spd.frobenius(normalized.matrix)
    good = normalized.finite & jnp.isfinite(residual)
    values = values * normalized.unit[..., None]
    return EigenBasis(
        vectors=jnp.where(spd.column(good), vectors, spd.identity_like(vectors)),
        values=jnp.where((good & normalized.usable)[..., None], values, 0),
        residual=jnp.where(good, residual, jnp.inf),
    )
