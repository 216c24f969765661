"""One stack from its scaling to the verdict: a method's attempt, and eigh where that misses."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.roots.eigh import eigh_root, eigh_root_and_basis
from optalr.linalg.roots.interface import MethodResult, RootTask
from optalr.linalg.roots.methods import RootMethod, choose


class Arguments(NamedTuple):
    """The arrays of a call, all with the stack's leading dimensions."""

    matrix: jax.Array  # (..., n, n)
    damping: jax.Array  # (...)
    power: jax.Array | None  # (...), p where it is traced
    basis: jax.Array | None  # (..., n, n)
    tolerance: jax.Array | None  # (...)


class Settings(NamedTuple):
    """What a compiled call is specialized to."""

    power: int | float | None  # p where it is known
    method: str
    order: int


class Verdict(NamedTuple):
    """A stack's result, whether each is a success, and whether it is eigh's after a miss."""

    result: MethodResult
    success: jax.Array  # (...) bool
    fell_back: jax.Array  # (...) bool


@functools.partial(jax.jit, static_argnames="settings")
def solve_with_fallback(arguments: Arguments, *, settings: Settings) -> Verdict:
    """Take the roots of a stack, by eigh where the method misses its tolerance.

    Under ``vmap`` this solves the larger stack, so that the fallback's ``cond`` stays a branch.
    """

    @jax.custom_batching.custom_vmap
    def solve_stack(arguments: Arguments) -> Verdict:
        return _solve_stack(arguments, settings)

    @solve_stack.def_vmap
    def _(axis_size, in_batched, arguments):
        stacked = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            arguments,
            in_batched[0],
        )
        verdict = solve_stack(stacked)
        return verdict, jax.tree.map(lambda _: True, verdict)

    return solve_stack(arguments)


def _solve_stack(arguments: Arguments, settings: Settings) -> Verdict:
    normalized = spd.normalize(arguments.matrix, arguments.damping)
    p = settings.power if arguments.power is None else arguments.power
    task = RootTask(normalized.matrix, p, settings.order, arguments.basis)
    on_cpu, elsewhere = choose(settings.method, task)

    def attempt(method: RootMethod, operands: Any) -> tuple[MethodResult, jax.Array]:
        normalized, basis, tolerance = operands
        own = task._replace(matrix=normalized.matrix, basis=basis)
        return _attempt(method, own, usable=normalized.usable, tolerance=tolerance)

    operands = normalized, arguments.basis, arguments.tolerance
    if on_cpu is elsewhere:
        result, fell_back = attempt(on_cpu, operands)
    else:
        result, fell_back = jax.lax.platform_dependent(
            operands,
            cpu=functools.partial(attempt, on_cpu),
            default=functools.partial(attempt, elsewhere),
        )
    result, success = _finish(normalized, result, p=p, tolerance=arguments.tolerance)
    return Verdict(result, success, fell_back)


def _attempt(
    method: RootMethod, task: RootTask, *, usable: jax.Array, tolerance: jax.Array | None
) -> tuple[MethodResult, jax.Array]:
    """Run one method, and eigh once for those of the stack where it missed its tolerance."""
    result = method.take(task)
    none_fell = jnp.zeros(usable.shape, bool)
    if not method.can_miss:
        return result, none_fell
    failed = usable & ~_within(result, tolerance)

    def fall_back(result: MethodResult) -> tuple[MethodResult, jax.Array]:
        other = eigh_root(task) if result.basis is None else eigh_root_and_basis(task)
        # Written so that a NaN residual loses.
        take = failed & ~(result.residual <= other.residual)
        return jax.tree.map(
            lambda new, old: jnp.where(spd.align(take, new), new, old), other, result
        ), take

    return jax.lax.cond(jnp.any(failed), fall_back, lambda result: (result, none_fell), result)


def _within(result: MethodResult, tolerance: jax.Array | None) -> jax.Array:
    """Return which residuals are within the tolerance; a NaN is not."""
    limit = spd.default_tolerance(result.condition) if tolerance is None else tolerance
    return result.residual <= limit


def _finish(
    normalized: spd.Normalized, result: MethodResult, *, p: Any, tolerance: jax.Array | None
) -> tuple[MethodResult, jax.Array]:
    """Undo the scaling, and leave nothing that is not finite."""
    root = result.root * spd.column(spd.power_of_two(-normalized.exponent / p))
    exists = normalized.usable & jnp.isfinite(root).all((-2, -1)) & jnp.isfinite(result.residual)
    return result._replace(
        root=jnp.where(spd.column(exists), root, 0),
        residual=jnp.where(exists, result.residual, jnp.inf),
    ), exists & _within(result, tolerance)
