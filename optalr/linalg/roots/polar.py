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

from typing import NamedTuple

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
    start_vector,
    taylor,
)
from optalr.linalg.spd import MethodResult, RootTask


def cholesky_polar_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th root of a normalized stack, p a power of two."""
    matrix, p, on_cpu = task.matrix, task.power, task.on_cpu
    bound, largest = largest_eigenvalue_bound(matrix)
    num_steps = jnp.zeros(matrix.shape[:-2], jnp.int32)
    current, remaining = matrix, p
    while remaining > 2:
        lower, orthogonal, steps = _cholesky_and_polar(current, bound, on_cpu)
        bound = jnp.sqrt(bound)
        current = spd.symmetric_part(spd.matmul(lower, spd.transpose(orthogonal)))
        num_steps, remaining = num_steps + steps, remaining // 2
    if p == 1:
        lower = cholesky(matrix, on_cpu=on_cpu)
        inverse = solve_lower_right(lower, spd.identity_like(lower), on_cpu=on_cpu)
        root = spd.matmul(spd.transpose(inverse), inverse)
    else:
        lower, orthogonal, steps = _cholesky_and_polar(current, bound, on_cpu)
        root = spd.symmetric_part(solve_lower_right(lower, orthogonal, on_cpu=on_cpu))
        num_steps = num_steps + steps
    residual = spd.root_residual(matrix, root, p)
    return MethodResult(root, residual, condition_estimate(largest, root, p), num_steps)


class _Distance(NamedTuple):
    """How far ``YᵀY`` is from the identity."""

    deviation: jax.Array  # (..., n, n), R = I − YᵀY
    error: jax.Array  # (...), its Frobenius norm over √n
    radius: jax.Array  # (...), an estimate of its spectral norm
    probe: jax.Array  # (..., n, 1), near its leading eigenvector


class _Polar(NamedTuple):
    """What a step reads and writes."""

    factor: jax.Array  # (..., n, n), Y
    distance: _Distance
    active: jax.Array  # (...) bool
    num_steps: jax.Array  # (...) int32


def _cholesky_and_polar(
    matrix: jax.Array, bound: jax.Array, on_cpu: bool | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return L, its orthogonal factor and the steps taken; NaN where L does not exist.

    ``bound`` is that of the largest eigenvalue.
    """
    lower = cholesky(matrix, on_cpu=on_cpu)
    factor = lower / jnp.sqrt(spd.column(bound))
    distance = _distance_from_orthogonal(factor, start_vector(factor), 6)
    error = distance.error
    close = float(jnp.finfo(lower.dtype).eps) ** (1 / 3)
    active = (error > close) & jnp.isfinite(error)
    limit = max_steps(lower.dtype, 3)
    final = jax.lax.while_loop(
        lambda loop: jnp.any(loop.active & (loop.num_steps < limit)),
        lambda loop: _polar_step(loop, close),
        _Polar(factor, distance, active, jnp.zeros(error.shape, jnp.int32)),
    )
    # One more step cubes the error, which is enough to reach rounding from ``close``.
    b, c = (jnp.full_like(error, value) for value in taylor(2, 3))
    return lower, _multiply(final, b, c), final.num_steps + 1


def _polar_step(loop: _Polar, close: float) -> _Polar:
    """Advance the active matrices of the stack; leave the others as they are."""
    factor = _multiply(loop, *coefficients(loop.distance.radius, 2, 3))
    distance = _distance_from_orthogonal(factor, loop.distance.probe, 2)
    error = distance.error
    stalled = has_stalled(loop.distance.error, error, factor)
    active = loop.active & ~stalled & (error > close) & jnp.isfinite(error)
    new = _Polar(factor, distance, active, loop.num_steps + 1)
    return jax.tree.map(
        lambda new, old: jnp.where(spd.align(loop.active, new), new, old), new, loop
    )


def _multiply(loop: _Polar, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return ``Y (I + bR + cR²)``."""
    deviation = loop.distance.deviation
    square = spd.matmul(deviation, deviation)
    polynomial = spd.column(b) * deviation + spd.column(c) * square
    return loop.factor + spd.matmul(loop.factor, polynomial)


def _distance_from_orthogonal(factor: jax.Array, probe: jax.Array, num_products: int) -> _Distance:
    """Measure a factor; a power iteration estimates the radius, from ``probe`` on."""
    deviation = spd.identity_like(factor) - spd.matmul(spd.transpose(factor), factor)
    radius, probe = power_iteration(deviation, probe, num_products)
    return _Distance(deviation, spd.frobenius(deviation), radius, probe)
