"""Inverse p-th roots of symmetric positive (semi)definite matrices, batched and jit-compiled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_choice, check_interval
from optalr.linalg import _spd
from optalr.linalg._eigh import MethodResult, eigh_root

METHODS = ("auto", "eigh")


class InverseRoot(NamedTuple):
    """An inverse root and how good it is.

    Attributes:
      root: ``(..., n, n)``, symmetric up to rounding and always finite: zeros where the matrix or
        its damping was not finite, or where the damped matrix was zero.
      residual: ``(...)``, ``‖XAX − I‖_F/√n`` for p = 2 (``‖X^⌊p/2⌋ A X^⌈p/2⌉ − I‖_F/√n`` for a
        whole p, the same with p = 2 in the eigenbasis used for any other), A damped. Infinite
        where there is no root; never NaN, so ``residual <= limit`` decides.
      success: ``(...)`` bool, whether the residual is within the tolerance; where it is False
        callers keep the root they had.
      num_steps: ``(...)`` int32, iterations taken.
      fell_back: ``(...)`` bool, whether this is eigh's answer after the method asked for failed.
    """

    root: jax.Array
    residual: jax.Array
    success: jax.Array
    num_steps: jax.Array
    fell_back: jax.Array


def inverse_root(
    matrix: Any,
    p: Any = 2,
    *,
    damping: Any = 0.0,
    method: str = "auto",
    tolerance: Any = None,
) -> InverseRoot:
    """Compute ``(A + damping·I)^{-1/p}`` of each matrix in a stack.

    Args:
      matrix: ``(..., n, n)`` symmetric positive semidefinite; float32 or float64, anything else is
        worked on in float32. Only its symmetric part counts.
      p: which root, > 0; it may be traced.
      damping: absolute, >= 0, in the units of ``matrix``; a number, or one a matrix.
      method: ``"auto"`` or ``"eigh"``.
      tolerance: the residual that counts as success; None for ``max(1e-4, 8·ε·condition)``, where
        the condition is at most 1/ε.

    Returns:
      An ``InverseRoot``.

    Raises:
      TypeError: the matrix is complex.
      ValueError: ``matrix`` is not square, or an argument is outside its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import inverse_root
      >>> x, residual, *_ = inverse_root(jnp.diag(jnp.array([4.0, 16.0])))
      >>> bool(jnp.allclose(x, jnp.diag(jnp.array([0.5, 0.25])))), bool(residual < 1e-6)
      (True, True)
    """
    matrix = _spd.as_square_stack("matrix", matrix)
    check_choice("method", method, METHODS)
    check_interval("p", p, 0, open_low=True, remedy="Pass p=2 for the inverse square root.")
    if jnp.ndim(damping) == 0:
        check_interval("damping", damping, 0)
    damping = _spd.broadcast_damping("damping", damping, matrix)
    normalized = _spd.normalize(matrix, damping)
    return _finish(normalized, p, eigh_root(normalized.matrix, p), tolerance)


def _finish(
    normalized: _spd.Normalized, p: Any, result: MethodResult, tolerance: Any
) -> InverseRoot:
    """Undo the scaling, judge the residual, and leave nothing that is not finite."""
    unscale = jnp.power(normalized.scale, jnp.asarray(-1 / p, normalized.scale.dtype))
    root = result.root * _spd.column(unscale)
    exists = normalized.usable & jnp.isfinite(root).all((-2, -1)) & jnp.isfinite(result.residual)
    limit = _spd.default_tolerance(result.condition) if tolerance is None else tolerance
    residual = jnp.where(exists, result.residual, jnp.inf)
    return InverseRoot(
        root=jnp.where(_spd.column(exists), root, 0),
        residual=residual,
        success=residual <= limit,
        num_steps=result.num_steps,
        fell_back=jnp.zeros(residual.shape, bool),
    )
