"""Eigenbases of symmetric matrices: computing, refreshing and leaving them behind.

A basis is kept between steps because it moves slowly: it is refreshed by one QR step instead of
decomposed anew, and what was accumulated in its coordinates is carried over.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import lapack, spd
from optalr.linalg.roots.eigh import orthogonal_step


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

    Args:
      matrix: ``(..., n, n)``, symmetric; only its symmetric part counts.

    Returns:
      An ``EigenBasis``, values ascending.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import eigenbasis
      >>> eigenbasis(jnp.diag(jnp.array([3.0, 1.0]))).values.tolist()
      [1.0, 3.0]
    """
    matrix = spd.as_square_stack("matrix", matrix)
    normalized = spd.normalize(matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    values, vectors = lapack.eigh(normalized.matrix)
    image = spd.matmul(normalized.matrix, vectors)
    return _judge(normalized, image, vectors, values)


@jax.jit
def refresh_eigenbasis(matrix: Any, vectors: jax.Array) -> EigenBasis:
    """Improve an eigenbasis by one step of orthogonal iteration, ``Q ← qr(A Q)``.

    Choose it where a factor has moved a little since its last decomposition: a QR and two products
    cost a fraction of an eigendecomposition on an accelerator. The columns are first sorted by
    falling ``diag(QᵀAQ)``, so that the leading ones act as power iteration and the trailing ones as
    inverse iteration; the order of the columns may therefore change between calls
    (``carry_second_moments`` takes care of it).

    Args:
      matrix: ``(..., n, n)``, symmetric positive semidefinite.
      vectors: ``(..., n, n)``, the basis to start from, orthonormal.

    Returns:
      An ``EigenBasis`` whose ``residual`` says how far from diagonal the matrix still is.

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
    return _judge(normalized, image, vectors, jnp.sum(vectors * image, -2))


def _judge(
    normalized: spd.Normalized, image: jax.Array, vectors: jax.Array, values: jax.Array
) -> EigenBasis:
    """Undo the scaling and leave nothing that is not finite."""
    error = spd.frobenius(image - vectors * values[..., None, :])
    residual = error / spd.frobenius(normalized.matrix)
    good = normalized.finite & jnp.isfinite(residual)
    values = jnp.ldexp(values, normalized.exponent[..., None])
    return EigenBasis(
        vectors=jnp.where(spd.column(good), vectors, spd.identity_like(vectors)),
        values=jnp.where((good & normalized.usable)[..., None], values, 0),
        residual=jnp.where(good, residual, jnp.inf),
    )
