"""Solving one stack: scaling, the choice of a method, its one fallback, the verdict."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.roots.eigh import MethodResult, eigh_root, refreshed_root
from optalr.linalg.roots.newton import coupled_newton_root
from optalr.linalg.roots.polar import cholesky_polar_root

# Where, on a CPU, Cholesky + polar takes no longer than eigh at condition 1e2 and at 1e6, by
# benchmarks/roots.py: matrices of this many rows, at least this many rows in the stack. The coupled
# iteration is about as fast there, and less accurate at a high condition.
CPU_POLAR_ROWS = (32, 64)
CPU_POLAR_TOTAL = 256


class Arguments(NamedTuple):
    """The arrays of a call, all with the stack's leading dimensions."""

    matrix: jax.Array  # (..., n, n)
    damping: jax.Array  # (...)
    power: jax.Array | None  # (...), p where it is traced
    basis: jax.Array | None  # (..., n, n)
    tolerance: jax.Array | None  # (...)


@functools.partial(jax.jit, static_argnames=("power", "method", "order"))
def solve(
    arguments: Arguments, *, power: int | float | None, method: str, order: int
) -> tuple[MethodResult, jax.Array, jax.Array]:
    """Return a stack's result, whether each is a success, and whether it fell back to eigh.

    Under ``vmap`` this solves the larger stack, so that the fallback's ``cond`` stays a branch.
    """

    @jax.custom_batching.custom_vmap
    def solve_stack(arguments: Arguments) -> tuple[MethodResult, jax.Array, jax.Array]:
        return _solve_stack(arguments, power, method, order)

    @solve_stack.def_vmap
    def _(axis_size, in_batched, arguments):
        stacked = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            arguments,
            in_batched[0],
        )
        result = solve_stack(stacked)
        return result, jax.tree.map(lambda _: True, result)

    return solve_stack(arguments)


def _solve_stack(
    arguments: Arguments, power: int | float | None, method: str, order: int
) -> tuple[MethodResult, jax.Array, jax.Array]:
    normalized = spd.normalize(arguments.matrix, arguments.damping)
    p = power if arguments.power is None else arguments.power
    run = functools.partial(_run, p=p, order=order)
    operands = normalized, arguments.basis, arguments.tolerance
    if method == "auto" and isinstance(p, int):
        result, fell_back = jax.lax.platform_dependent(
            *operands,
            cpu=functools.partial(run, method=_cpu_method(p, normalized.matrix.shape)),
            default=functools.partial(run, method=_accelerator_method(p)),
        )
    else:
        result, fell_back = run(*operands, method="eigh" if method == "auto" else method)
    return *_finish(normalized, result, p, arguments.tolerance), fell_back


def _cpu_method(p: int, shape: tuple[int, ...]) -> str:
    """Return the fastest method on a CPU, as far as the condition does not decide."""
    if p == 1:
        return "cholesky_polar"
    n = shape[-1]
    low, high = CPU_POLAR_ROWS
    many = math.prod(shape[:-1]) >= CPU_POLAR_TOTAL
    return "cholesky_polar" if p == 2 and low <= n <= high and many else "eigh"


def _accelerator_method(p: int) -> str:
    """Return the method with the fewest products; decompositions are slow there."""
    return "cholesky_polar" if p <= 2 else "coupled_newton"


def _run(
    normalized: spd.Normalized,
    basis: jax.Array | None,
    tolerance: jax.Array | None,
    *,
    method: str,
    p: Any,
    order: int,
) -> tuple[MethodResult, jax.Array]:
    """Run one method, and eigh once for those of the stack where it missed its tolerance."""
    matrix = normalized.matrix
    none_fell = jnp.zeros(normalized.usable.shape, bool)
    if method == "eigh":
        return eigh_root(matrix, p), none_fell
    if method == "coupled_newton":
        result = coupled_newton_root(matrix, p, order)
    elif method == "cholesky_polar":
        result = cholesky_polar_root(matrix, p)
    elif basis is None:
        return eigh_root(matrix, p, keep_basis=True), none_fell
    else:
        result = refreshed_root(matrix, basis, p)
    failed = normalized.usable & ~_within(result, tolerance)

    def fall_back(result: MethodResult) -> tuple[MethodResult, jax.Array]:
        other = eigh_root(matrix, p, keep_basis=result.basis is not None)
        # Written so that a NaN residual loses.
        take = failed & ~(result.residual <= other.residual)
        return jax.tree.map(
            lambda new, old: jnp.where(spd.align(take, new), new, old), other, result
        ), take

    return jax.lax.cond(jnp.any(failed), fall_back, lambda result: (result, none_fell), result)


def _within(result: MethodResult, tolerance: jax.Array | None) -> jax.Array:
    """Tell which residuals are within the tolerance; a NaN is not."""
    limit = spd.default_tolerance(result.condition) if tolerance is None else tolerance
    return result.residual <= limit


def _finish(
    normalized: spd.Normalized, result: MethodResult, p: Any, tolerance: jax.Array | None
) -> tuple[MethodResult, jax.Array]:
    """Undo the scaling, and leave nothing that is not finite."""
    root = result.root * spd.column(spd.power_of_two(-normalized.exponent / p))
    exists = normalized.usable & jnp.isfinite(root).all((-2, -1)) & jnp.isfinite(result.residual)
    return result._replace(
        root=jnp.where(spd.column(exists), root, 0),
        residual=jnp.where(exists, result.residual, jnp.inf),
    ), exists & _within(result, tolerance)
