"""Coupled Newton iterations of order 2 and 3: inverse p-th roots from matrix products alone.

    R = I − M,   T = I + bR + cR²,   X ← X T,   M ← T^{p/2} M T^{p/2}   (T^p M for odd p)

starting from ``M = A/u``, ``X = u^{-1/p} I``, so that ``M = X^p A`` (up to rounding) all along and
X is the root when M has become the identity. ``u`` bounds the largest eigenvalue. The iteration
needs products only, so it is the method for accelerators. The coefficients adapt to the distance of
M's spectrum from one. A power iteration follows that distance from step to step (M's eigenvectors
never change). At the end X is corrected by its true residual, in ``_correct_leading``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import spd
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


class _Newton(NamedTuple):
    """What a step reads and writes; ``error`` and ``radius`` describe ``deviation``."""

    root: jax.Array  # (..., n, n), X
    coupled: jax.Array  # (..., n, n), M
    probe: jax.Array  # (..., n, 1), near the eigenvector of M farthest from one
    error: jax.Array  # (...), ‖I − M‖_F/√n
    radius: jax.Array  # (...), estimate of ‖I − M‖_2
    active: jax.Array  # (...) bool
    num_steps: jax.Array  # (...) int32


def coupled_newton_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th root of a normalized stack, p a whole number."""
    matrix, p, order = task.matrix, task.power, task.order
    bound, largest = largest_eigenvalue_bound(matrix)
    coupled = matrix / spd.column(bound)
    error, radius, probe = _distance_from_one(coupled, start_vector(matrix), 6)
    start = _Newton(
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
        lambda loop: _newton_step(loop, p=p, order=order, close=close),
        start,
    )
    ends = (jnp.full(error.shape, c, matrix.dtype) for c in taylor(p, order))
    root = spd.symmetric_part(spd.matmul(final.root, _factor(final.coupled, *ends)))
    unscale = jnp.power(bound, jnp.asarray(-1 / p, bound.dtype))
    root = root * spd.column(unscale)
    if p <= 2:
        root = _correct_leading(matrix, root, p=p, bound=bound)
    residual = spd.root_residual(matrix, root, p)
    return MethodResult(root, residual, condition_estimate(largest, root, p), final.num_steps + 1)


def _correct_leading(matrix: jax.Array, root: jax.Array, *, p: int, bound: jax.Array) -> jax.Array:
    """Return the root, p at most 2, corrected where its backward error shows.

    Rounding leaves errors E of ε‖X‖ everywhere. That is much beside the *small* eigenvalues of X,
    in the directions of A's large ones, and ``‖X⁻² − A‖/‖A‖`` sees little else. In A's eigenbasis

        D = I − XAX,   D_ij = s_ij √u E_ij,   s_ij = (√λ_i + √λ_j)/√u,   0 < s_ij <= 2,

    so that ``X + q(s) D/√u`` leaves ``(1 − s q(s)) E``. With ``q = (3 − s)/2`` that is
    ``(1 − s)(1 − s/2) E``: nothing where both eigenvalues are among the largest or one is much
    smaller, an eighth at most in between, and never more than E. (Newton's own ``X + XD/2``
    *amplifies* what does not commute with A.) ``s D`` is ``YD + DY`` with ``Y = AX/√u``. The same
    holds for p = 1, without the roots. For higher p there is no such bound on ``s``.
    """
    scale = jnp.power(bound, jnp.asarray(-1 / p, bound.dtype))
    image = spd.matmul(matrix, root)
    product, lengths = (image, matrix) if p == 1 else (spd.matmul(root, image), image)
    deviation = spd.identity_like(root) - spd.symmetric_part(product)
    turned = spd.matmul(deviation, lengths * spd.column(scale))
    step = 1.5 * deviation - spd.symmetric_part(turned)
    return root + spd.column(2 / p * scale) * step


def _newton_step(loop: _Newton, *, p: int, order: int, close: float) -> _Newton:
    """Advance the active matrices of the stack; leave the others as they are."""
    b, c = coefficients(loop.radius, p, order)
    factor = _factor(loop.coupled, b, c if order == 3 else None)
    root = spd.matmul(loop.root, factor)
    if p % 2:
        coupled = spd.matmul(spd.integer_power(factor, p), loop.coupled)
    else:
        half = spd.integer_power(factor, p // 2)
        coupled = spd.matmul(half, spd.matmul(loop.coupled, half))
    coupled = spd.symmetric_part(coupled)
    error, radius, probe = _distance_from_one(coupled, loop.probe, 2)
    # Where rounding has taken over, the better of the two iterates is kept.
    stalled = has_stalled(loop.error, error, loop.coupled)
    broken = ~jnp.isfinite(error)
    take = loop.active & ~broken & ~(stalled & (error >= loop.error))
    keep = loop.active & ~broken & ~stalled & (error > close)

    def choose(new, old):
        return jnp.where(spd.column(take), new, old)

    return _Newton(
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


def _distance_from_one(
    coupled: jax.Array, probe: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``‖I − M‖_F/√n``, an estimate of ``‖I − M‖_2`` and the vector it came from."""
    deviation = spd.identity_like(coupled) - coupled
    radius, probe = power_iteration(deviation, probe, num_steps)
    return spd.frobenius(deviation), radius, probe
