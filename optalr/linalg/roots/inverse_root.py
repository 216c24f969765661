"""Inverse p-th roots of symmetric positive (semi)definite matrices, batched and jit-compiled.

The methods are defined in ``decompositions``, ``newton`` and ``polar``.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.arguments import check_choice, check_interval, is_concrete
from optalr.linalg import spd
from optalr.linalg.roots import decompositions
from optalr.linalg.roots.newton import coupled_newton_root
from optalr.linalg.roots.polar import cholesky_polar_root
from optalr.linalg.spd import MethodResult, RootTask

# Where no tolerance is asked for, a root is held to max(FLOOR, FACTOR · ε · condition): what
# rounding leaves within reach.
TOLERANCE_FLOOR = 1e-4
TOLERANCE_FACTOR = 8.0
# Where, on a CPU, Cholesky + polar takes no longer than eigh at condition 1e2 and at 1e6, by
# benchmarks/roots.py: matrices of this many rows, at least this many rows in the stack. The coupled
# iteration is about as fast there, and less accurate at a high condition.
CPU_POLAR_ROWS = (32, 64)
CPU_POLAR_TOTAL = 256


class RootMethod(NamedTuple):
    """A way to take roots of a normalized stack."""

    take: Callable[[RootTask], MethodResult]
    whole_powers: bool = False  # whether p must be whole, and known
    can_miss: bool = True  # whether eigh is tried where it misses the tolerance


EIGH = RootMethod(decompositions.eigh_root, can_miss=False)
POLAR = RootMethod(cholesky_polar_root, whole_powers=True)
NEWTON = RootMethod(coupled_newton_root, whole_powers=True)
REFRESH = RootMethod(decompositions.refreshed_root)
# What REFRESH does without a basis to start from.
FIRST_BASIS = RootMethod(decompositions.eigh_root_and_basis, can_miss=False)
BY_NAME: Mapping[str, RootMethod] = MappingProxyType(
    {"eigh": EIGH, "coupled_newton": NEWTON, "cholesky_polar": POLAR, "eigenbasis": REFRESH}
)
AUTO = "auto"
METHODS = (AUTO, *BY_NAME)


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
      cheap there and eigendecompositions are not (published timings; not measured by us). A p that
      is traced or not whole takes ``"eigh"``.

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
    check_choice("method", method, METHODS)
    check_interval("p", p, 0, open_low=True, remedy="Pass p=2 for the inverse square root.")
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order!r}.")
    if jnp.ndim(damping) == 0:
        check_interval("damping", damping, 0)
    if basis is not None and method != "eigenbasis":
        raise ValueError(f"basis is read by method='eigenbasis' only, got method={method!r}.")
    power = _known_power(p, method)

    def a_matrix(number: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(number, matrix.dtype), matrix.shape[:-2])

    arrays = _Arrays(
        matrix=matrix,
        damping=spd.broadcast_damping("damping", damping, matrix),
        power=a_matrix(p) if power is None else None,
        basis=None if basis is None else spd.broadcast_basis(basis, matrix),
        tolerance=None if tolerance is None else a_matrix(tolerance),
    )
    return _solve(arrays, power=power, method=method, order=order)


def _known_power(p: Any, method: str) -> int | float | None:
    """Return p, an int where it is whole, None where it is traced; raise if the method cannot."""
    value = float(np.asarray(p)) if is_concrete(p) else None
    power = int(value) if value is not None and value.is_integer() else value
    chosen = BY_NAME.get(method, EIGH)  # auto takes any power, as eigh does
    if not chosen.whole_powers:
        return power
    if power is None:
        raise TypeError(f"p must be a known number for method={method!r}. Pass method='eigh'.")
    if not isinstance(power, int):
        raise ValueError(f"p must be whole for method={method!r}, got {p!r}. Pass method='eigh'.")
    if chosen is POLAR and power & (power - 1):
        raise ValueError(
            f"p must be a power of two for method={method!r}, got {p!r}. Pass "
            "method='coupled_newton'."
        )
    return power


class _Arrays(NamedTuple):
    """The arrays of a call, all with the stack's leading dimensions."""

    matrix: jax.Array  # (..., n, n)
    damping: jax.Array  # (...)
    power: jax.Array | None  # (...), p where it is traced
    basis: jax.Array | None  # (..., n, n)
    tolerance: jax.Array | None  # (...)


@functools.partial(jax.jit, static_argnames=("power", "method", "order"))
def _solve(arrays: _Arrays, **known: Any) -> InverseRoot:
    """Take roots; under ``vmap``, of one larger stack, to keep the fallback's ``cond`` a branch."""
    solve_stack = jax.custom_batching.custom_vmap(functools.partial(_solve_stack, **known))

    @solve_stack.def_vmap
    def _(axis_size, in_batched, arrays):
        stacked = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            arrays,
            in_batched[0],
        )
        solved = solve_stack(stacked)
        return solved, jax.tree.map(lambda _: True, solved)

    return solve_stack(arrays)


def _solve_stack(
    arrays: _Arrays, *, power: int | float | None, method: str, order: int
) -> InverseRoot:
    """Scale a stack, run a method, with eigh where that misses, and judge the result."""
    normalized = spd.normalize(arrays.matrix, arrays.damping)
    p: Any = arrays.power if power is None else power
    task = RootTask(normalized.matrix, p, order, arrays.basis)
    judged = {"usable": normalized.usable, "tolerance": arrays.tolerance}
    # One question about the device, and none inside.
    on_cpu, elsewhere = (
        functools.partial(_run_or_fall_back, chosen, task=task._replace(on_cpu=is_cpu), **judged)
        for chosen, is_cpu in zip(_choose(method, task), (True, False), strict=True)
    )
    result, fell_back = jax.lax.platform_dependent(cpu=on_cpu, default=elsewhere)
    # Undo the scaling, and leave nothing that is not finite.
    root = result.root * spd.column(spd.inverse_root_of_unit(normalized.unit, p))
    exists = normalized.usable & jnp.isfinite(root).all((-2, -1)) & jnp.isfinite(result.residual)
    return InverseRoot(
        root=jnp.where(spd.column(exists), root, 0),
        residual=jnp.where(exists, result.residual, jnp.inf),
        success=exists & _within(result, arrays.tolerance),
        num_steps=result.num_steps,
        fell_back=fell_back,
        basis=result.basis,
    )


def _choose(method: str, task: RootTask) -> tuple[RootMethod, RootMethod]:
    """Return what to run for the task on a CPU, and what elsewhere."""
    if method != AUTO:
        chosen = BY_NAME[method]
        if chosen is REFRESH and task.basis is None:
            chosen = FIRST_BASIS
        return chosen, chosen
    p, shape = task.power, task.matrix.shape
    if not isinstance(p, int):
        return EIGH, EIGH  # nothing else takes a root that is traced or not whole
    # The fastest on a CPU, whatever the condition.
    low, high = CPU_POLAR_ROWS
    many = math.prod(shape[:-1]) >= CPU_POLAR_TOTAL
    suits_cpu = p == 1 or (p == 2 and low <= shape[-1] <= high and many)
    # Decompositions are slow on accelerators: there, the fewest products.
    return (POLAR if suits_cpu else EIGH), (POLAR if p <= 2 else NEWTON)


def _run_or_fall_back(
    method: RootMethod, *, task: RootTask, usable: jax.Array, tolerance: jax.Array | None
) -> tuple[MethodResult, jax.Array]:
    """Run one method, and eigh once for those of the stack where it missed its tolerance."""
    result = method.take(task)
    none_fell = jnp.zeros(usable.shape, bool)
    if not method.can_miss:
        return result, none_fell
    failed = usable & ~_within(result, tolerance)

    def fall_back(result: MethodResult) -> tuple[MethodResult, jax.Array]:
        other = (EIGH if result.basis is None else FIRST_BASIS).take(task)
        # Written so that a NaN residual loses.
        take = failed & ~(result.residual <= other.residual)
        return jax.tree.map(
            lambda new, old: jnp.where(spd.align(take, new), new, old), other, result
        ), take

    return jax.lax.cond(jnp.any(failed), fall_back, lambda result: (result, none_fell), result)


def _within(result: MethodResult, tolerance: jax.Array | None) -> jax.Array:
    """Return which residuals are within the tolerance; a NaN is not."""
    if tolerance is None:
        eps = jnp.finfo(result.condition.dtype).eps
        tolerance = jnp.maximum(TOLERANCE_FLOOR, TOLERANCE_FACTOR * eps * result.condition)
    return result.residual <= tolerance
