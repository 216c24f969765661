"""Inverse p-th roots of symmetric positive (semi)definite matrices, batched and jit-compiled.

``stacks`` takes the roots, by the methods that ``methods`` lists.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import check_interval
from optalr.linalg import spd
from optalr.linalg.roots.methods import checked_power
from optalr.linalg.roots.stacks import Asked, Found, Manner, solve


class InverseRoot(NamedTuple):
    """An inverse root, and how good it is.

    Attributes:
      root: ``(..., n, n)``, symmetric up to rounding and always finite: zeros where the matrix or
        its damping was not finite, or where the damped matrix was zero.
      residual: ``(...)``, ``‖XAX − I‖_F/√n`` for p = 2, with A damped. For another whole p it is
        ``‖X^⌊p/2⌋ A X^⌈p/2⌉ − I‖_F/√n``; for any other p that of p = 2 in the same eigenbasis.
        Infinite where there is no root and never NaN, so ``residual <= limit`` decides.
      success: ``(...)`` bool, whether the residual is within the tolerance. Where it is False,
        callers keep the root that they had.
      num_steps: ``(...)`` int32, iterations that the method took (1 for a decomposition).
      fell_back: ``(...)`` bool, whether the root is eigh's because the method asked for failed.
      basis: ``(..., n, n)`` with ``method="eigenbasis"``: the refreshed basis, to pass next time;
        None with any other method.
    """

    root: jax.Array
    residual: jax.Array
    success: jax.Array
    num_steps: jax.Array
    fell_back: jax.Array
    basis: jax.Array | None = None


def inverse_root(
    matrix: Any,
    p: Any = 2,
    *,
    damping: Any = 0.0,
    method: str = "auto",
    order: int = 3,
    basis: Any = None,
    tolerance: Any = None,
) -> InverseRoot:
    """Compute ``(A + damping·I)^{-1/p}`` of each matrix in a stack.

    Choose it to precondition by a power of a matrix. These are the methods, the powers p that each
    can do, and when to choose it:

    * ``"eigh"``, any p > 0, also a traced one. Eigenvalues below ε times the largest count as ε
      times the largest, so a singular matrix has a (huge) finite root too.
    * ``"cholesky_polar"``, p = 1, 2, 4, 8, ...: in float32 the most accurate by a factor of about
      ten at condition 1e4 and up, because it works on a factor with the root of the condition.
    * ``"coupled_newton"``, whole p: matrix products alone, in iterations of ``order`` 2 or 3. For
      p = 2 in float32, from 16 rows up, at conditions 1e2 to 1e6, and for spectra that are spread,
      in two clusters or of few large eigenvalues, its residual is at most 1.15 times eigh's and its
      backward error ``‖X⁻² − A‖/‖A‖`` 0.2 to 1.0 times eigh's (below 16 rows both are a few
      ε√condition, and either can be the larger). ``"cholesky_polar"`` has 0.2 to 0.7 of eigh's.
    * ``"eigenbasis"``, any p: one QR step from ``basis``, the eigenvectors of a slightly different
      matrix, then as ``"eigh"``. This is an approximation, and its residual says how good it is.
      Pass the ``tolerance`` that you can accept, or it nearly always falls back to eigh.
    * ``"auto"``, by backend and size. On a CPU ``"eigh"``, except ``"cholesky_polar"`` for p = 1,
      and for p = 2 from 32 to 64 rows if the stack has 256 rows in all: there it is no slower at
      condition 1e2 and at 1e6 (``benchmarks/roots.py``). Elsewhere
      ``"cholesky_polar"`` for p = 1 and 2 and ``"coupled_newton"`` for other whole p: products are
      cheap there and eigendecompositions are not (on an H100 16 matrices of 1024 rows took 18
      to 26 ms by the former for p = 2, and 59 ms by eigh). But on a GPU ``"eigh"`` takes up to 128
      rows for p > 1. A p that is traced or not whole takes ``"eigh"``.

    Where a method does not reach its tolerance (it stagnates, or the matrix is not definite), eigh
    is tried once. If eigh misses it too, ``success`` is False and the caller keeps the last good
    root. All methods work on a scaled copy, so the scale of the matrix does not matter. They work
    in full precision, since TF32 products would cost all digits. Inside ``jax.vmap`` too the
    fallback costs something only when a matrix needs it.

    Args:
      matrix: ``(..., n, n)`` symmetric positive semidefinite; float32 or float64, and any other
        dtype is converted to float32. Only its symmetric part counts.
      p: which root, > 0.
      damping: absolute, >= 0, in the units of ``matrix``; one number, or one per matrix.
      method: one of the above.
      order: of the coupled Newton iteration, 2 or 3.
      basis: ``(..., n, n)``, for ``method="eigenbasis"``; None starts from a full decomposition.
      tolerance: the residual that counts as success; None for ``max(1e-4, 8·ε·condition)``, where
        the condition is at most 1/ε.

    Returns:
      An ``InverseRoot``.

    Raises:
      TypeError: the matrix is complex, or p is traced where the method needs its value.
      ValueError: ``matrix`` is not square, or an argument is outside its range.

    Cost: in products of n×n matrices, for p = 2: ``"cholesky_polar"`` 3 a step and
    ``"coupled_newton"`` 3 (order 2) or 4 (order 3) a step and 3 at the end. Order 3 takes 5 steps
    at condition 1e2 and 9 at 1e6, in float32, order 2 takes 7 and 13. Every residual costs 2.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optalr.linalg import inverse_root
      >>> x, residual, *_ = inverse_root(jnp.diag(jnp.array([4.0, 16.0])))
      >>> bool(jnp.allclose(x, jnp.diag(jnp.array([0.5, 0.25])))), bool(residual < 1e-6)
      (True, True)

    Reference: Guo & Higham 2006, "A Schur-Newton method for the matrix pth root and its inverse",
    equation 3.9 for the coupled iteration, and Higham 2008, "Functions of Matrices", chapters 7 and
    8. Our departures: the coefficients are Taylor's only at the end (see ``steering``), the
    stopping rule judges the iterate's distance from the identity, a last step corrects the iterate
    by its true residual (``newton``), and eigh is the fallback.
    """
    matrix = spd.as_square_stack("matrix", matrix)
    power = checked_power(p, method, order)
    if jnp.ndim(damping) == 0:
        check_interval("damping", damping, 0)
    if basis is not None and method != "eigenbasis":
        raise ValueError(f"basis is read by method='eigenbasis' only, got method={method!r}.")

    lead = matrix.shape[:-2]
    stack = matrix.reshape(-1, *matrix.shape[-2:])

    def a_matrix(number: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(number, matrix.dtype), lead).reshape(-1)

    asked = Asked(
        stacks=[stack],
        damping=spd.broadcast_damping("damping", damping, matrix).reshape(-1),
        power=a_matrix(p) if power is None else None,
        bases=None if basis is None else [spd.broadcast_basis(basis, matrix).reshape(stack.shape)],
        tolerance=None if tolerance is None else a_matrix(tolerance),
    )
    [found] = each_root(solve(asked, Manner(power, method, order)), [stack])
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def each_root(found: Found, stacks: Sequence[jax.Array]) -> list[InverseRoot]:
    """Return what was found for each stack, with zeros where there is no root."""
    exists = jnp.isfinite(found.residual)
    numbers = (
        spd.split(each, stacks)
        for each in (exists, found.residual, found.success, found.num_steps, found.fell_back)
    )
    bases = found.bases or [None] * len(stacks)
    return [
        InverseRoot(jnp.where(spd.column(exists), root, 0), *each, basis=basis)
        for root, basis, exists, *each in zip(found.roots, bases, *numbers, strict=True)
    ]
