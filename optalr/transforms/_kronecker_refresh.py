"""Taking the roots, or the eigenbases, of all Kronecker factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.arguments import is_concrete
from optalr.linalg import eigenbasis, inverse_root
from optalr.transforms import _kronecker_factors as factors
from optalr.transforms import _kronecker_memory as store
from optalr.transforms._kronecker_plan import LeafPlan

# Of an eigendecomposition ‖AQ − QΛ‖_F/‖A‖_F must stay below this, in units of √n ε.
_EIGH_TOLERANCE = 100.0


class Outcome(NamedTuple):
    """What a batched decomposition gives for each matrix of a stack."""

    matrix: jax.Array  # (k, b, b), the root or the eigenbasis
    values: jax.Array  # (k, b), eigenvalues; of a root ones
    residual: jax.Array  # (k,)
    success: jax.Array  # (k,)


def refresh(
    setup: store.Setup, memory: store.Memory, weight: jax.Array, first: jax.Array
) -> tuple[store.Memory, jax.Array, jax.Array]:
    """Take new roots; return also the worst residual in use and the number of roots that failed."""
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
            requests.append(((i, which), each, copies.reshape(-1)))
    outcomes = _by_size(requests, lambda a, d: _decompose(setup, a, d))
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
            usable = jnp.where(outcome.success, outcome.residual, 0)
            residual = jnp.maximum(residual, jnp.max(usable).astype(jnp.float32))
        _store(setup, rooted, i, pair, small, success, first)
    return rooted, residual, failed


def _by_size(requests: list[Any], decompose: Callable[..., Outcome]) -> dict[Any, Outcome]:
    """Decompose matrices of equal size and type in one batched call each."""
    groups: dict[Any, list[Any]] = {}
    for request in requests:
        groups.setdefault((request[1].shape[-1], request[1].dtype), []).append(request)
    outcomes = {}
    for group in groups.values():
        matrices = jnp.concatenate([matrix for _, matrix, _ in group])
        dampings = jnp.concatenate([damping for _, _, damping in group])
        whole, start = decompose(matrices, dampings), 0
        for key, matrix, _ in group:
            stop = start + matrix.shape[0]
            outcomes[key] = Outcome(*(part[start:stop] for part in whole))
            start = stop
    return outcomes


def _decompose(setup: store.Setup, matrices: jax.Array, dampings: jax.Array) -> Outcome:
    ones = jnp.ones(matrices.shape[:-1], matrices.dtype)
    if setup.spectrum == "factored" and is_concrete(setup.exponent) and float(setup.exponent) == 0:
        eye = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
        return Outcome(eye, ones, jnp.zeros_like(dampings), jnp.ones(dampings.shape, bool))
    if setup.spectrum == "factored":
        result = inverse_root(
            matrices, -1 / setup.exponent, damping=dampings, method=setup.root_method
        )
        return Outcome(result.root, ones, result.residual, result.success)
    basis = eigenbasis(matrices)
    limit = _EIGH_TOLERANCE * jnp.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5
    values = jnp.maximum(basis.values, 0)
    # A factor that is zero is no failure: any basis is one of its bases.
    zero = (matrices == 0).all((-2, -1))
    success = (basis.residual <= limit) | zero
    return Outcome(basis.vectors, values, jnp.where(zero, 0, basis.residual), success)


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
            fresh = outcome.values
        elif setup.spectrum == "factored":
            new[which] = jnp.where(success, small[i, which], old[which])
            continue
        else:
            fresh = small[i, which]
        if setup.spectrum != "factored":
            shaped = factors.flat_values(plan, fresh)
            values[which] = jnp.where(success, shaped, values[which])
    rooted.row_roots[i], rooted.col_roots[i] = new
    rooted.row_eigenvalues[i], rooted.col_eigenvalues[i] = values
    if setup.spectrum == "measured":
        start = store.outer(setup, values[0], values[1])
        moved = _move_moment(plan, old, new, rooted.second_moments[i])
        moment = jnp.where(first, start, moved)
        rooted.second_moments[i] = jnp.where(success, moment, rooted.second_moments[i])


def _move_moment(plan: LeafPlan, old: list[Any], new: list[Any], moment: Any) -> jax.Array:
    """Carry a second moment to a new basis: the diagonal of the same matrix seen from there."""
    turns = []
    for side, before, after in zip(plan.sides, old, new, strict=True):
        if side.form == "diagonal":
            turns.append(before)
        else:
            turns.append(jnp.square(jnp.swapaxes(after, -1, -2) @ before))
    return factors.apply_both(plan, turns[0], turns[1], moment)
