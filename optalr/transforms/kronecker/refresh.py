"""Taking the roots, or the eigenbases, of all Kronecker factors."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.linalg import EigenBasis, eigenbasis, inverse_root, refresh_eigenbasis
from optalr.transforms.kronecker import factors
from optalr.transforms.kronecker import memory as store
from optalr.transforms.kronecker.leaves import LeafPlan

# Of an eigendecomposition ‖AQ − QΛ‖_F/‖A‖_F must stay below this, in units of √n ε.
_EIGH_TOLERANCE = 100.0
# How far a refreshed basis may stay from the eigenvectors before all are computed anew: the root's
# ‖XAX − I‖_F/√n, and ‖AQ − QΛ‖_F/‖A‖_F where the basis itself is used. With the first, two or three
# roots in a hundred are, and the direction stays within 0.24 of the exact one
# (benchmarks/warm_basis.py: an MLP on digits); the second is a guess.
_WARM_ROOT_TOLERANCE = 0.3
_WARM_BASIS_TOLERANCE = 0.1


class Outcome(NamedTuple):
    """What a batched decomposition gives for each matrix of a stack."""

    matrix: jax.Array  # (k, b, b), the root or the eigenbasis
    values: jax.Array  # (k, b), eigenvalues; of a root ones
    basis: jax.Array | None  # (k, b, b), refreshed, where it is kept beside the root
    residual: jax.Array  # (k,)
    success: jax.Array  # (k,)


def refresh(
    setup: store.Setup,
    memory: store.Memory,
    weight: jax.Array,
    first: jax.Array,
    last_residual: jax.Array,
) -> tuple[store.Memory, jax.Array, jax.Array]:
    """Take new roots; return also the worst residual in use and the number of roots that failed.

    A leaf that keeps its old roots may have those of ``last_residual``, the worst until now.
    """
    requests, small = [], {}
    for i in setup.kernels():
        if setup.sources[i].kind == "bias":
            continue
        plan = setup.plans[i]
        pair = store.corrected(memory, i, weight)
        dampings = factors.factor_dampings(plan, *pair, setup.damping, setup.damping_form)
        for which, side in enumerate(plan.sides):
            if side.form == "diagonal":
                small[i, which] = _diagonal_root(setup, pair[which], dampings[which])
                continue
            each = pair[which].reshape(-1, side.block, side.block)
            spread = factors.expand(dampings[which], dampings[which].ndim + 1)
            copies = jnp.broadcast_to(spread, (*plan.stack, side.num_blocks))
            last = _last_basis(setup, memory, i, which, each.shape)
            requests.append(((i, which), each, copies.reshape(-1), last))
    outcomes = _by_size(requests, lambda a, d, q: _decompose(setup, a, d, q, first))
    results = list(memory)
    rooted = store.Memory(*(list(leaves) for leaves in results))
    residual, failed = jnp.float32(0), jnp.int32(0)
    for i in sorted({key[0] for key in [*outcomes, *small]}):
        pair = [outcomes.get((i, which)) for which in (0, 1)]
        found = [outcome for outcome in pair if outcome is not None]
        # Both or neither: half a pair would have the wrong scale.
        success = jnp.bool_(True)
        for outcome in found:
            success &= outcome.success.all()
            failed += jnp.sum(~outcome.success, dtype=jnp.int32)
        taken = [jnp.max(outcome.residual).astype(jnp.float32) for outcome in found]
        for each in taken:
            residual = jnp.maximum(residual, jnp.where(success, each, last_residual))
        _store(setup, rooted, i, pair, small, success, first)
    return rooted, residual, failed


def _by_size(requests: list[Any], decompose: Callable[..., Outcome]) -> dict[Any, Outcome]:
    """Decompose matrices of equal size and type in one batched call each."""
    groups: dict[Any, list[Any]] = {}
    for request in requests:
        groups.setdefault((request[1].shape[-1], request[1].dtype), []).append(request)
    outcomes = {}
    for group in groups.values():
        # Without bases the third part is None in every request.
        parts = [list(part) for part in zip(*(request[1:] for request in group), strict=True)]
        joined = [None if part[0] is None else jnp.concatenate(part) for part in parts]
        whole, start = decompose(*joined), 0
        for key, matrix, *_ in group:
            stop = start + matrix.shape[0]
            outcomes[key] = jax.tree.map(lambda part: part[start:stop], whole)  # noqa: B023
            start = stop
    return outcomes


def _last_basis(
    setup: store.Setup, memory: store.Memory, i: int, which: int, shape: tuple[int, ...]
) -> jax.Array | None:
    """Return the basis to refresh, where bases are refreshed."""
    if setup.root_method != "eigenbasis":
        return None
    beside = setup.spectrum == "factored"
    kept = (memory.row_bases, memory.col_bases) if beside else (memory.row_roots, memory.col_roots)
    basis = kept[which][i]
    assert basis is not None
    return basis.reshape(shape)


def _decompose(
    setup: store.Setup,
    matrices: jax.Array,
    dampings: jax.Array,
    last: jax.Array | None,
    first: jax.Array,
) -> Outcome:
    ones = jnp.ones(matrices.shape[:-1], matrices.dtype)
    if setup.spectrum == "factored" and is_concrete(setup.exponent) and float(setup.exponent) == 0:
        eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
        zeros = jnp.zeros_like(dampings)
        return Outcome(eye, ones, last, zeros, jnp.ones(dampings.shape, bool))
    if setup.spectrum == "factored":
        take = partial(inverse_root, p=-1 / setup.exponent, damping=dampings)
        if last is None:
            result = take(matrices, method=setup.root_method)
        else:
            warm = partial(take, method="eigenbasis", basis=last, tolerance=_WARM_ROOT_TOLERANCE)
            result = jax.lax.cond(first, partial(take, method="eigenbasis"), warm, matrices)
        return Outcome(result.root, ones, result.basis, result.residual, result.success)
    # A factor that is zero is no failure: any basis is one of its bases.
    zero = (matrices == 0).all((-2, -1))
    basis, limit = _bases(matrices, last, first, zero)
    values = jnp.maximum(basis.values, 0)
    success = (basis.residual <= limit) | zero
    return Outcome(basis.vectors, values, None, jnp.where(zero, 0, basis.residual), success)


def _bases(
    matrices: jax.Array, last: jax.Array | None, first: jax.Array, zero: jax.Array
) -> tuple[EigenBasis, jax.Array | float]:
    """Return eigenbases and the residual that counts as success; from ``last`` if that is near."""
    if last is None:
        limit = _EIGH_TOLERANCE * jnp.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5
        return eigenbasis(matrices), limit
    warm = refresh_eigenbasis(matrices, last)
    behind = first | jnp.any(~zero & ~(warm.residual <= _WARM_BASIS_TOLERANCE))
    anew = jax.lax.cond(behind, lambda: eigenbasis(matrices), lambda: warm)
    return anew, _WARM_BASIS_TOLERANCE


def _diagonal_root(setup: store.Setup, diagonal: jax.Array, damping: jax.Array) -> jax.Array:
    if setup.spectrum != "factored":
        return diagonal
    spread = factors.expand(damping, diagonal.ndim)
    return factors.damped_power(diagonal, spread, setup.exponent)


def _store(
    setup: store.Setup,
    rooted: store.Memory,
    i: int,
    pair: list[Outcome | None],
    small: dict[Any, jax.Array],
    success: jax.Array,
    first: jax.Array,
) -> None:
    """Write the new roots of leaf ``i`` into ``rooted``, keeping the old ones on failure."""
    plan = setup.plans[i]
    old = [rooted.row_roots[i], rooted.col_roots[i]]
    new = list(old)
    values = [rooted.row_eigenvalues[i], rooted.col_eigenvalues[i]]
    for which, outcome in enumerate(pair):
        if outcome is not None:
            new[which] = jnp.where(success, outcome.matrix.reshape(old[which].shape), old[which])
            if outcome.basis is not None:
                bases = (rooted.row_bases, rooted.col_bases)[which]
                fresh = outcome.basis.reshape(old[which].shape)
                bases[i] = jnp.where(success, fresh, bases[i])
            fresh = outcome.values
        elif setup.spectrum == "factored":
            new[which] = jnp.where(success, small[i, which], old[which])
            continue
        else:
            fresh = small[i, which]
        if setup.spectrum != "factored":
            shaped = factors.flat_values(plan, fresh)
            values[which] = jnp.where(success, shaped, values[which])
    before = store.units(setup, rooted, i) if setup.spectrum == "measured" else None
    rooted.row_roots[i], rooted.col_roots[i] = new
    rooted.row_eigenvalues[i], rooted.col_eigenvalues[i] = values
    if before is not None:
        moment = _move_moment(plan, old, new, rooted.second_moments[i])
        for unit, other in zip(before, store.units(setup, rooted, i), strict=True):
            moment = moment * (unit / other)
        # Moments that do not fit the new units are taken from the factors as at the start.
        start = first | ~jnp.isfinite(moment).all()
        moment = jnp.where(start, store.outer(setup, rooted, i), moment)
        rooted.second_moments[i] = jnp.where(success, moment, rooted.second_moments[i])


def _move_moment(plan: LeafPlan, old: list[Any], new: list[Any], moment: Any) -> jax.Array:
    """Carry a second moment to a new basis: the diagonal of the same matrix seen from there."""
    turns = []
    for side, before, after in zip(plan.sides, old, new, strict=True):
        if side.form == "diagonal":
            turns.append(before)
        else:
            turns.append(jnp.square(factors.matmul(jnp.swapaxes(after, -1, -2), before)))
    return factors.apply_both(plan, turns[0], turns[1], moment)
