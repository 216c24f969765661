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
    normalized = _normalize(matrix)
    values, vectors = eigh(normalized.stacks[0])
    return _judge(normalized, vectors=vectors, values=values, like=matrix)


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
    vectors = spd.broadcast_basis(jnp.asarray(vectors, matrix.dtype), matrix)
    normalized = _normalize(matrix)
    stack = normalized.stacks[0]
    vectors = orthogonal_step(stack, vectors.reshape(stack.shape))
    return _judge(normalized, vectors=vectors, values=None, like=matrix)


def near_eigenbasis(
    matrices: jax.Array, last: jax.Array, *, limit: float, anew: jax.Array, never: jax.Array
) -> EigenBasis:
    """Return bases refreshed from the last ones, and decomposed where that is not good enough.

    Each matrix is judged by itself: which others it shares a stack with depends on the number of
    devices.

    Args:
      matrices: ``(k, n, n)``.
      last: ``(k, n, n)``, the bases to start from.
      limit: the residual up to which a refreshed basis is good enough.
      anew: () bool, whether to decompose all.
      never: ``(k,)`` bool, which need not be judged.
    """
    warm = refresh_eigenbasis(matrices, last)
    behind = anew | (~never & ~(warm.residual <= limit))

    def decompose() -> EigenBasis:
        return jax.tree.map(
            lambda a, b: jnp.where(spd.align(behind, a), a, b), eigenbasis(matrices), warm
        )

    return jax.lax.cond(jnp.any(behind), decompose, lambda: warm)


def rounding_of(matrices: jax.Array) -> float:
    """Return √n ε, which rounding leaves of a residual of ``eigenbasis`` but for a small factor."""
    return float(jnp.finfo(matrices.dtype).eps) * matrices.shape[-1] ** 0.5


def _normalize(matrix: jax.Array) -> spd.Normalized:
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    return spd.normalize([stack], jnp.zeros(stack.shape[:1], matrix.dtype))


def _judge(
    normalized: spd.Normalized, *, vectors: jax.Array, values: jax.Array | None, like: jax.Array
) -> EigenBasis:
    """Return the basis with the scaling undone and nothing left that is not finite.

    Without ``values`` they are those of the matrix in the basis.
    """
    [stack] = normalized.stacks
    image = spd.matmul(stack, vectors)
    values = diagonal_in(vectors, image) if values is None else values
    residual = spd.frobenius([image - vectors * values[..., None, :]]) / spd.frobenius([stack])
    good = normalized.finite & jnp.isfinite(residual)
    values = values * normalized.unit[..., None]
    lead = like.shape[:-2]
    found = EigenBasis(
        vectors=jnp.where(spd.column(good), vectors, spd.identity_like(vectors)),
        values=jnp.where((good & normalized.usable)[..., None], values, 0),
        residual=jnp.where(good, residual, jnp.inf),
    )
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
