"""Coupled Newton iterations of order 2 and 3: inverse p-th roots from matrix products alone.

    R = I − M,   T = I + bR + cR²,   X ← X T,   M ← T^{p/2} M T^{p/2}   (T^p M for odd p)

starting from ``M = A/u``, ``X = u^{-1/p} I``, so that ``M = X^p A`` (up to rounding) all along and
X is the root when M has become the identity. ``u`` bounds the largest eigenvalue. Only products:
the method for accelerators. The coefficients adapt to the distance of M's spectrum from one, which
a power iteration follows from step to step (M's eigenvectors never change). At the end X is
corrected by its true residual, ``_correct_leading``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.linalg import spd
from optalr.linalg.roots import polynomials
from optalr.linalg.roots.eigh import MethodResult


class _Loop(NamedTuple):
    """What a step reads and writes; ``error`` and ``radius`` describe ``deviation``."""

    root: jax.Array  # (..., n, n), X
    coupled: jax.Array  # (..., n, n), M
    probe: jax.Array  # (..., n, 1), near the eigenvector of M farthest from one
    error: jax.Array  # (...), ‖I − M‖_F/√n
    radius: jax.Array  # (...), estimate of ‖I − M‖_2
    active: jax.Array  # (...) bool
    num_steps: jax.Array  # (...) int32


def start_vector(matrix: jax.Array) -> jax.Array:
    """Return a fixed random unit vector ``(..., n, 1)``: it holds some of every eigenvector."""
    n = matrix.shape[-1]
    # Irrational entries: a vector of signs can be orthogonal to eigenvectors of simple matrices.
    vector = np.random.default_rng(n).standard_normal((n, 1))
    vector = vector / np.linalg.norm(vector)
    return jnp.broadcast_to(jnp.asarray(vector, matrix.dtype), (*matrix.shape[:-1], 1))


def power_iteration(
    matrix: jax.Array, vector: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Return a lower estimate of ``‖matrix‖_2``, and the improved vector."""

    def step(_, carry):
        image = spd.matmul(matrix, carry[1])
        norm = jnp.sqrt(jnp.sum(jnp.square(image), (-2, -1)))
        return norm, jnp.where(spd.column(norm > 0), image / spd.column(norm), carry[1])

    start = jnp.ones(matrix.shape[:-2], matrix.dtype), vector
    return jax.lax.fori_loop(0, num_steps, step, start)


def largest_eigenvalue_bound(matrix: jax.Array) -> jax.Array:
    """Return a number between the largest eigenvalue and some 1.4 times it.

    The two norms are bounds for certain; the power iteration's estimate is one for all but
    contrived matrices: after ten steps from a random start it is within a factor ``n^{1/20}``.
    """
    estimate, _ = power_iteration(matrix, start_vector(matrix), 10)
    frobenius = jnp.sqrt(jnp.sum(jnp.square(matrix), (-2, -1)))
    rows = jnp.max(jnp.sum(jnp.abs(matrix), -1), -1)
    return jnp.minimum(jnp.minimum(frobenius, rows), 1.3 * estimate)


def near_one(error: jax.Array, matrix: jax.Array) -> jax.Array:
    """Tell where a spectrum lies within a half of one, by ``error = ‖I − M‖_F/√n``.

    For certain, which the estimate of the radius is not: a start vector may hold next to nothing of
    the one eigenvector that is still far away.
    """
    return error * matrix.shape[-1] ** 0.5 < 0.5


def max_steps(dtype: jnp.dtype, order: int) -> int:
    """Return more steps than a condition of 1/ε needs: growth by 3.5, or 6, then convergence."""
    return int(np.ceil(-np.log(float(jnp.finfo(dtype).eps)) / np.log(3.5 if order == 2 else 6))) + 8


def coupled_newton_root(matrix: jax.Array, p: int, order: int) -> MethodResult:
    """Return the inverse p-th root of a normalized stack, p a whole number."""
    bound = largest_eigenvalue_bound(matrix)
    coupled = matrix / spd.column(bound)
    error, radius, probe = _measure(coupled, start_vector(matrix), 6)
    start = _Loop(
        root=spd.identity_like(matrix),
        coupled=coupled,
        probe=probe,
        error=error,
        radius=radius,
        active=jnp.ones(error.shape, bool),
        num_steps=jnp.zeros(error.shape, jnp.int32),
    )
    # Once this close, a last step on X alone reaches rounding: the error's square, or cube.
    close = float(jnp.finfo(matrix.dtype).eps) ** (1 / order)
    start = start._replace(active=error > close)
    limit = max_steps(matrix.dtype, order)
    final = jax.lax.while_loop(
        lambda loop: jnp.any(loop.active & (loop.num_steps < limit)),
        lambda loop: _step(loop, p, order, close),
        start,
    )
    taylor = polynomials.taylor(p, order)
    factor = _factor(final.coupled, *(jnp.full(error.shape, c, matrix.dtype) for c in taylor))
    root = spd.matmul(final.root, factor)
    root = 0.5 * (root + spd.transpose(root))
    unscale = jnp.power(bound, jnp.asarray(-1 / p, bound.dtype))
    root = root * spd.column(unscale)
    if p <= 2:
        root = _correct_leading(matrix, root, p, bound)
    residual = spd.root_residual(matrix, root, p)
    return MethodResult(root, residual, condition_estimate(matrix, root, p), final.num_steps + 1)


def _correct_leading(matrix: jax.Array, root: jax.Array, p: int, bound: jax.Array) -> jax.Array:
    """Return the root, p at most 2, with the errors mended that its backward error shows.

    Rounding leaves errors E of ε‖X‖ everywhere. Beside the *small* eigenvalues of X, in the large
    ones' directions of A, that is much, and ``‖X⁻² − A‖/‖A‖`` sees little else. In A's eigenbasis

        D = I − XAX,   D_ij = s_ij √u E_ij,   s_ij = (√λ_i + √λ_j)/√u,   0 < s_ij <= 2,

    so that ``X + q(s) D/√u`` leaves ``(1 − s q(s)) E``. With ``q = (3 − s)/2`` that is
    ``(1 − s)(1 − s/2) E``: nothing where both are among the largest or one is much smaller, an
    eighth at most in between, and never more than E. (Newton's own ``X + XD/2`` *amplifies* what
    does not commute with A.) ``s D`` is ``YD + DY`` with ``Y = AX/√u``. For p = 1 likewise, without
    the roots; for higher p there is no such bound on ``s``.
    """
    scale = jnp.power(bound, jnp.asarray(-1 / p, bound.dtype))
    image = spd.matmul(matrix, root)
    product, lengths = (image, matrix) if p == 1 else (spd.matmul(root, image), image)
    deviation = spd.identity_like(root) - 0.5 * (product + spd.transpose(product))
    turned = spd.matmul(deviation, lengths * spd.column(scale))
    step = 1.5 * deviation - 0.5 * (turned + spd.transpose(turned))
    return root + spd.column(2 / p * scale) * step


def _step(loop: _Loop, p: int, order: int, close: float) -> _Loop:
    """Advance the active matrices of the stack; leave the others as they are."""
    b, c = polynomials.coefficients(loop.radius, p, order)
    factor = _factor(loop.coupled, b, c if order == 3 else None)
    root = spd.matmul(loop.root, factor)
    if p % 2:
        coupled = spd.matmul(spd.integer_power(factor, p), loop.coupled)
    else:
        half = spd.integer_power(factor, p // 2)
        coupled = spd.matmul(half, spd.matmul(loop.coupled, half))
    coupled = 0.5 * (coupled + spd.transpose(coupled))
    error, radius, probe = _measure(coupled, loop.probe, 2)
    # Far from one the error may rise for a step (an overshoot); near it, it must fall, or rounding
    # has the last word: then the iterate before is kept.
    stalled = near_one(loop.error, loop.coupled) & ~(error < 0.5 * loop.error)
    broken = ~jnp.isfinite(error)
    take = loop.active & ~broken & ~(stalled & (error >= loop.error))
    keep = loop.active & ~broken & ~stalled & (error > close)

    def choose(new, old):
        return jnp.where(spd.column(take), new, old)

    return _Loop(
        root=choose(root, loop.root),
        coupled=choose(coupled, loop.coupled),
        probe=choose(probe, loop.probe),
        error=jnp.where(take, error, loop.error),
        radius=jnp.where(take, radius, loop.radius),
        active=keep,
        num_steps=loop.num_steps + loop.active,
    )


def _factor(coupled: jax.Array, b: jax.Array, c: jax.Array | None) -> jax.Array:
    """Return ``T = I + bR + cR²`` with ``R = I − M``."""
    eye = spd.identity_like(coupled)
    deviation = eye - coupled
    factor = eye + spd.column(b) * deviation
    if c is None:
        return factor
    return factor + spd.column(c) * spd.matmul(deviation, deviation)


def _measure(
    coupled: jax.Array, probe: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``‖I − M‖_F/√n``, an estimate of ``‖I − M‖_2`` and the vector it came from."""
    deviation = spd.identity_like(coupled) - coupled
    radius, probe = power_iteration(deviation, probe, num_steps)
    return spd.frobenius(deviation), radius, probe


def condition_estimate(matrix: jax.Array, root: jax.Array, p: int) -> jax.Array:
    """Return ``‖A‖_2 ‖X‖_2^p`` by power iteration, at most 1/ε."""
    start = start_vector(matrix)
    largest, _ = power_iteration(matrix, start, 8)
    norm, _ = power_iteration(root, start, 8)
    limit = 1 / float(jnp.finfo(matrix.dtype).eps)
    return jnp.minimum(largest * jnp.power(norm, p), limit)
