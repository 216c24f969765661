"""Inverse square roots by Cholesky and a polar decomposition: only √condition is ever seen.

    A = L Lᵀ,   L = A^{1/2} W (W orthogonal),   A^{-1/2} = W L^{-1}

L's condition is the square root of A's, so in float32 this keeps digits that methods working on A
itself lose. The fourth root is that of ``A^{1/2} = L Wᵀ``, and so on for p a power of two.

The orthogonal factor is the limit of ``Y ← Y (I + bR + cR²)``, ``R = I − YᵀY``, from a multiple of
L, with coefficients that adapt to what is left of the spectrum. Three products a step, where the
coupled iteration of order 3 takes four, and no inverses, which batch badly everywhere and, with the
threaded LAPACK of a CPU that others use too, can be slower by orders of magnitude.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import lapack, spd
from optalr.linalg.roots import polynomials
from optalr.linalg.roots.eigh import MethodResult
from optalr.linalg.roots.newton import (
    condition_estimate,
    largest_eigenvalue_bound,
    max_steps,
    near_one,
    power_iteration,
    start_vector,
)


def cholesky_polar_root(matrix: jax.Array, p: int) -> MethodResult:
    """Return the inverse p-th root of a normalized stack, p a power of two."""
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
    return lower, *polar_factor(lower, largest_eigenvalue_bound(matrix))


class _Loop(NamedTuple):
    """What a step reads and writes; the last four describe ``deviation = I − YᵀY``."""

    factor: jax.Array  # (..., n, n), Y
    active: jax.Array  # (...) bool
    num_steps: jax.Array  # (...) int32
    deviation: jax.Array  # (..., n, n)
    error: jax.Array  # (...), its Frobenius norm over √n
    radius: jax.Array  # (...), an estimate of its spectral norm
    probe: jax.Array  # (..., n, 1), near its leading eigenvector


def polar_factor(lower: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the orthogonal factor of L and the steps taken; ``bound`` is one on ``‖LᵀL‖_2``."""
    close = float(jnp.finfo(lower.dtype).eps) ** (1 / 3)
    scaled = lower / jnp.sqrt(spd.column(bound))
    deviation, error, radius, probe = _measure(scaled, start_vector(scaled), 6)
    start = _Loop(
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
        lambda loop: _step(loop, close),
        start,
    )
    # This close, one more step reaches rounding: it cubes the error.
    b, c = (jnp.full_like(final.error, value) for value in polynomials.taylor(2, 3))
    return _multiply(final, b, c), final.num_steps + 1


def _step(loop: _Loop, close: float) -> _Loop:
    """Advance the active matrices of the stack; leave the others as they are."""
    factor = _multiply(loop, *polynomials.coefficients(loop.radius, 2, 3))
    deviation, error, radius, probe = _measure(factor, loop.probe, 2)
    # Near the limit the error must fall, or rounding has the last word.
    stalled = near_one(loop.error, factor) & ~(error < 0.5 * loop.error)
    active = loop.active & ~stalled & (error > close) & jnp.isfinite(error)
    new = _Loop(factor, active, loop.num_steps + 1, deviation, error, radius, probe)
    return jax.tree.map(
        lambda new, old: jnp.where(spd.align(loop.active, new), new, old), new, loop
    )


def _multiply(loop: _Loop, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return ``Y (I + bR + cR²)``."""
    square = spd.matmul(loop.deviation, loop.deviation)
    polynomial = spd.column(b) * loop.deviation + spd.column(c) * square
    return loop.factor + spd.matmul(loop.factor, polynomial)


def _measure(
    factor: jax.Array, probe: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return ``R = I − YᵀY``, ``‖R‖_F/√n``, an estimate of ``‖R‖_2`` and the vector behind it."""
    deviation = spd.identity_like(factor) - spd.matmul(spd.transpose(factor), factor)
    radius, probe = power_iteration(deviation, probe, num_steps)
    return deviation, spd.frobenius(deviation), radius, probe
