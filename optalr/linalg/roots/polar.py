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

from optalr.linalg import lapack, spd
from optalr.linalg.roots import polynomials
from optalr.linalg.roots.estimates import (
    condition_estimate,
    has_stalled,
    largest_eigenvalue_bound,
    max_steps,
    power_iteration,
    start_vector,
)
from optalr.linalg.roots.interface import MethodResult, RootTask


def cholesky_polar_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th root of a normalized stack, p a power of two."""
    matrix, p = task.matrix, task.power
    num_steps = jnp.zeros(matrix.shape[:-2], jnp.int32)
    current, remaining = matrix, p
    while remaining > 2:
        lower, orthogonal, steps = _cholesky_and_polar(current)
        current = spd.matmul(lower, spd.transpose(orthogonal))
        current = 0.5 * (current + spd.transpose(current))
        num_steps, remaining = num_steps + steps, remaining // 2
    if remaining == 1:
        lower = lapack.cholesky(current)
        inverse = lapack.solve_lower_right(lower, spd.identity_like(lower))
        root = spd.matmul(spd.transpose(inverse), inverse)
    else:
        lower, orthogonal, steps = _cholesky_and_polar(current)
        root = lapack.solve_lower_right(lower, orthogonal)
        root = 0.5 * (root + spd.transpose(root))
        num_steps = num_steps + steps
    residual = spd.root_residual(matrix, root, p)
    return MethodResult(root, residual, condition_estimate(matrix, root, p), num_steps)


def _cholesky_and_polar(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return L, its orthogonal factor and the steps taken; NaN where L does not exist."""
    lower = lapack.cholesky(matrix)
    return lower, *_polar_factor(lower, largest_eigenvalue_bound(matrix))


class _Polar(NamedTuple):
    """What a step reads and writes; the last four describe ``deviation = I − YᵀY``."""

    factor: jax.Array  # (..., n, n), Y
    active: jax.Array  # (...) bool
    num_steps: jax.Array  # (...) int32
    deviation: jax.Array  # (..., n, n)
    error: jax.Array  # (...), its Frobenius norm over √n
    radius: jax.Array  # (...), an estimate of its spectral norm
    probe: jax.Array  # (..., n, 1), near its leading eigenvector


def _polar_factor(lower: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the orthogonal factor of L and the steps taken; ``bound`` is one on ``‖LᵀL‖_2``."""
    close = float(jnp.finfo(lower.dtype).eps) ** (1 / 3)
    scaled = lower / jnp.sqrt(spd.column(bound))
    deviation, error, radius, probe = _distance_from_orthogonal(scaled, start_vector(scaled), 6)
    start = _Polar(
        factor=scaled,
        active=(error > close) & jnp.isfinite(error),
        num_steps=jnp.zeros(error.shape, jnp.int32),
        deviation=deviation,
        error=error,
        radius=radius,
        probe=probe,
    )
    limit = max_steps(lower.dtype, 3)
    final = jax.lax.while_loop(
        lambda loop: jnp.any(loop.active & (loop.num_steps < limit)),
        lambda loop: _polar_step(loop, close),
        start,
    )
    # One more step cubes the error, which is enough to reach rounding from ``close``.
    b, c = (jnp.full_like(final.error, value) for value in polynomials.taylor(2, 3))
    return _multiply(final, b, c), final.num_steps + 1


def _polar_step(loop: _Polar, close: float) -> _Polar:
    """Advance the active matrices of the stack; leave the others as they are."""
    factor = _multiply(loop, *polynomials.coefficients(loop.radius, 2, 3))
    deviation, error, radius, probe = _distance_from_orthogonal(factor, loop.probe, 2)
    active = (
        loop.active
        & ~has_stalled(loop.error, error, factor)
        & (error > close)
        & jnp.isfinite(error)
    )
    new = _Polar(factor, active, loop.num_steps + 1, deviation, error, radius, probe)
    return jax.tree.map(
        lambda new, old: jnp.where(spd.align(loop.active, new), new, old), new, loop
    )


def _multiply(loop: _Polar, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return ``Y (I + bR + cR²)``."""
    square = spd.matmul(loop.deviation, loop.deviation)
    polynomial = spd.column(b) * loop.deviation + spd.column(c) * square
    return loop.factor + spd.matmul(loop.factor, polynomial)


def _distance_from_orthogonal(
    factor: jax.Array, probe: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return ``R = I − YᵀY``, ``‖R‖_F/√n``, an estimate of ``‖R‖_2`` and the vector behind it."""
    deviation = spd.identity_like(factor) - spd.matmul(spd.transpose(factor), factor)
    radius, probe = power_iteration(deviation, probe, num_steps)
    return deviation, spd.frobenius(deviation), radius, probe
