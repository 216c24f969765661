"""Inverse square roots by Cholesky and a polar decomposition: only √condition is ever seen.

    A = L Lᵀ,   L = A^{1/2} W (W orthogonal),   A^{-1/2} = W L^{-1}

L's condition is the square root of A's, so in float32 this keeps digits that are lost to methods
that work on A itself. The fourth root is the square root of ``A^{1/2} = L Wᵀ``, and so on for p a
power of two.

The orthogonal factor is the limit of ``Y ← Y (I + bR + cR²)``, ``R = I − YᵀY``, from a multiple of
L. The coefficients adapt to the part of the spectrum that is still far from one. A step takes three
products, where the coupled iteration of order 3 takes four. It takes no inverses: these batch badly
everywhere and can be slower by orders of magnitude with the threaded LAPACK of a busy CPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.roots.decompositions import cholesky, solve_lower_right
from optalr.linalg.roots.steering import (
    coefficients,
    condition_estimate,
    has_stalled,
    largest_eigenvalue_bound,
    max_steps,
    power_iteration,
    start_vectors,
    taylor,
)
from optalr.linalg.spd import MethodResult, RootTask


def cholesky_polar_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th roots of normalized stacks, p a power of two."""
    stacks, p, on_cpu = task.stacks, task.power, task.on_cpu
    bound, largest = largest_eigenvalue_bound(stacks)
    num_steps = jnp.zeros(bound.shape, jnp.int32)
    current, remaining = stacks, p
    while remaining > 2:
        lowers, orthogonals, steps = _cholesky_and_polar(current, bound, on_cpu)
        bound = jnp.sqrt(bound)
        products = map(spd.matmul, lowers, map(spd.transpose, orthogonals))
        current = list(map(spd.symmetric_part, products))
        num_steps, remaining = num_steps + steps, remaining // 2
    if p == 1:
        lowers = [cholesky(stack, on_cpu=on_cpu) for stack in stacks]
        inverses = [
            solve_lower_right(lower, spd.identity_like(lower), on_cpu=on_cpu) for lower in lowers
        ]
        roots = list(map(spd.matmul, map(spd.transpose, inverses), inverses))
    else:
        lowers, orthogonals, steps = _cholesky_and_polar(current, bound, on_cpu)
        roots = [
            spd.symmetric_part(solve_lower_right(lower, orthogonal, on_cpu=on_cpu))
            for lower, orthogonal in zip(lowers, orthogonals, strict=True)
        ]
        num_steps = num_steps + steps
    residual = spd.root_residuals(stacks, roots, p)
    return MethodResult(roots, residual, condition_estimate(largest, roots, p), num_steps)


class _Distance(NamedTuple):
    """How far ``YᵀY`` is from the identity."""

    deviations: list[jax.Array]  # each (k, n, n), R = I − YᵀY
    error: jax.Array  # (K,), its Frobenius norm over √n
    radius: jax.Array  # (K,), an estimate of its spectral norm
    probes: list[jax.Array]  # each (k, n, 1), near its leading eigenvector


class _Polar(NamedTuple):
    """What a step reads and writes."""

    factors: list[jax.Array]  # each (k, n, n), Y
    distance: _Distance
    active: jax.Array  # (K,) bool
    num_steps: jax.Array  # (K,) int32


def _cholesky_and_polar(
    stacks: Sequence[jax.Array], bound: jax.Array, on_cpu: bool | None
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Return L, its orthogonal factor and the steps taken; NaN where L does not exist.

    ``bound`` is that of the largest eigenvalue. One loop serves all stacks, until the last matrix
    has converged.
    """
    lowers = [cholesky(stack, on_cpu=on_cpu) for stack in stacks]
    units = spd.columns(jnp.sqrt(bound), stacks)
    factors = list(map(jnp.divide, lowers, units))
    distance = _distance_from_orthogonal(factors, start_vectors(factors), 6)
    error, dtype = distance.error, bound.dtype
    close = float(jnp.finfo(dtype).eps) ** (1 / 3)
    active = (error > close) & jnp.isfinite(error)
    limit = max_steps(dtype, 3)
    final = jax.lax.while_loop(
        lambda loop: jnp.any(loop.active & (loop.num_steps < limit)),
        lambda loop: _polar_step(loop, close),
        _Polar(factors, distance, active, jnp.zeros(error.shape, jnp.int32)),
    )
    # One more step cubes the error, which is enough to reach rounding from ``close``.
    b, c = (jnp.full_like(error, value) for value in taylor(2, 3))
    return lowers, _multiply(final, b, c), final.num_steps + 1


def _polar_step(loop: _Polar, close: float) -> _Polar:
    """Advance the active matrices; leave the others as they are."""
    factors = _multiply(loop, *coefficients(loop.distance.radius, 2, 3))
    distance = _distance_from_orthogonal(factors, loop.distance.probes, 2)
    error = distance.error
    stalled = has_stalled(loop.distance.error, error, factors)
    active = loop.active & ~stalled & (error > close) & jnp.isfinite(error)
    flags = spd.columns(loop.active, factors)

    def choose(new: Sequence[jax.Array], old: Sequence[jax.Array]) -> list[jax.Array]:
        return list(map(jnp.where, flags, new, old))

    before = loop.distance
    kept = _Distance(
        deviations=choose(distance.deviations, before.deviations),
        error=jnp.where(loop.active, error, before.error),
        radius=jnp.where(loop.active, distance.radius, before.radius),
        probes=distance.probes,
    )
    num_steps = loop.num_steps + loop.active
    return _Polar(choose(factors, loop.factors), kept, active, num_steps)


def _multiply(loop: _Polar, b: jax.Array, c: jax.Array) -> list[jax.Array]:
    """Return ``Y (I + bR + cR²)``."""

    def multiply(factor: jax.Array, deviation: jax.Array, b: Any, c: Any) -> jax.Array:
        square = spd.matmul(deviation, deviation)
        return factor + spd.matmul(factor, b * deviation + c * square)

    numbers = (spd.columns(each, loop.factors) for each in (b, c))
    return list(map(multiply, loop.factors, loop.distance.deviations, *numbers))


def _distance_from_orthogonal(
    factors: Sequence[jax.Array], probes: Sequence[jax.Array], num_products: int
) -> _Distance:
    """Measure factors; a power iteration estimates the radius, from ``probes`` on."""
    deviations = [
        spd.identity_like(factor) - spd.matmul(spd.transpose(factor), factor) for factor in factors
    ]
    radius, probes = power_iteration(deviations, probes, num_products)
    return _Distance(deviations, spd.frobenius(deviations), radius, probes)
