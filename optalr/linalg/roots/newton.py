"""Coupled Newton iterations of order 2 and 3: inverse p-th roots from matrix products alone.

    R = I − M,   T = I + bR + cR²,   X ← X T,   M ← T^{p/2} M T^{p/2}   (T^p M for odd p)

starting from ``M = A/u``, ``X = u^{-1/p} I``, so that ``M = X^p A`` (up to rounding) all along and
X is the root when M has become the identity. ``u`` bounds the largest eigenvalue. The iteration
needs products only, so it is the method for accelerators. The coefficients adapt to the distance of
M's spectrum from one. A power iteration follows that distance from step to step (M's eigenvectors
never change). At the end X is corrected by its true residual, in ``_correct_leading``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    start_vectors,
    taylor,
)
from optalr.linalg.spd import MethodResult, RootTask


class _Newton(NamedTuple):
    """What a step reads and writes; ``error`` and ``radius`` describe ``I − M``."""

    roots: list[jax.Array]  # each (k, n, n), X
    coupled: list[jax.Array]  # each (k, n, n), M
    probes: list[jax.Array]  # each (k, n, 1), near the eigenvector of M farthest from one
    error: jax.Array  # (K,), ‖I − M‖_F/√n
    radius: jax.Array  # (K,), estimate of ‖I − M‖_2
    active: jax.Array  # (K,) bool
    num_steps: jax.Array  # (K,) int32


def coupled_newton_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th roots of normalized stacks, p a whole number."""
    stacks, p, order = task.stacks, task.power, task.order
    bound, largest = largest_eigenvalue_bound(stacks)
    dtype = bound.dtype
    coupled = list(map(jnp.divide, stacks, spd.columns(bound, stacks)))
    error, radius, probes = _distance_from_one(coupled, start_vectors(stacks), 6)
    # Once this close, a last step on X alone reaches rounding: the error's square, or cube.
    close = float(jnp.finfo(dtype).eps) ** (1 / order)
    start = _Newton(
        roots=list(map(spd.identity_like, stacks)),
        coupled=coupled,
        probes=probes,
        error=error,
        radius=radius,
        active=error > close,
        num_steps=jnp.zeros(error.shape, jnp.int32),
    )
    limit = max_steps(dtype, order)
    final = jax.lax.while_loop(
        lambda loop: jnp.any(loop.active & (loop.num_steps < limit)),
        lambda loop: _newton_step(loop, p=p, order=order, close=close),
        start,
    )
    ends = (jnp.full(error.shape, c, dtype) for c in taylor(p, order))
    scale = jnp.power(bound, jnp.asarray(-1 / p, dtype))
    scales = spd.columns(scale, stacks)
    products = map(spd.matmul, final.roots, _factors(final.coupled, *ends))
    roots = [
        spd.symmetric_part(product) * scale for product, scale in zip(products, scales, strict=True)
    ]
    if p <= 2:
        corrections = spd.columns(2 / p * scale, stacks)
        each = zip(stacks, roots, scales, corrections, strict=True)
        roots = [root + c * _correction(matrix, root, s, p=p) for matrix, root, s, c in each]
    residual = spd.root_residuals(stacks, roots, p)
    return MethodResult(roots, residual, condition_estimate(largest, roots, p), final.num_steps + 1)


def _correction(matrix: jax.Array, root: jax.Array, scale: jax.Array, *, p: int) -> jax.Array:
    """Return what corrects the root, p at most 2, where its backward error shows.

    Rounding leaves errors E of ε‖X‖ everywhere. That is much beside the *small* eigenvalues of X,
    in the directions of A's large ones, and ``‖X⁻² − A‖/‖A‖`` sees little else. In A's eigenbasis

        D = I − XAX,   D_ij = s_ij √u E_ij,   s_ij = (√λ_i + √λ_j)/√u,   0 < s_ij <= 2,

    so that ``X + q(s) D/√u`` leaves ``(1 − s q(s)) E``. With ``q = (3 − s)/2`` that is
    ``(1 − s)(1 − s/2) E``: nothing where both eigenvalues are among the largest or one is much
    smaller, an eighth at most in between, and never more than E. (Newton's own ``X + XD/2``
    *amplifies* what does not commute with A.) ``s D`` is ``YD + DY`` with ``Y = AX/√u``. The same
    holds for p = 1, without the roots. For higher p there is no such bound on ``s``.
    """
    image = spd.matmul(matrix, root)
    product, lengths = (image, matrix) if p == 1 else (spd.matmul(root, image), image)
    deviation = spd.identity_like(root) - spd.symmetric_part(product)
    turned = spd.matmul(deviation, lengths * scale)
    return 1.5 * deviation - spd.symmetric_part(turned)


def _newton_step(loop: _Newton, *, p: int, order: int, close: float) -> _Newton:
    """Advance the active matrices; leave the others as they are."""
    b, c = coefficients(loop.radius, p, order)
    factors = _factors(loop.coupled, b, c if order == 3 else None)
    roots = list(map(spd.matmul, loop.roots, factors))

    def next_coupled(coupled: jax.Array, factor: jax.Array) -> jax.Array:
        if p % 2:
            return spd.symmetric_part(spd.matmul(spd.integer_power(factor, p), coupled))
        half = spd.integer_power(factor, p // 2)
        return spd.symmetric_part(spd.matmul(half, spd.matmul(coupled, half)))

    coupled = list(map(next_coupled, loop.coupled, factors))
    error, radius, probes = _distance_from_one(coupled, loop.probes, 2)
    # Where rounding has taken over, the better of the two iterates is kept.
    stalled = has_stalled(loop.error, error, coupled)
    broken = ~jnp.isfinite(error)
    take = loop.active & ~broken & ~(stalled & (error >= loop.error))
    keep = loop.active & ~broken & ~stalled & (error > close)
    flags = spd.columns(take, coupled)
    return _Newton(
        roots=list(map(jnp.where, flags, roots, loop.roots)),
        coupled=list(map(jnp.where, flags, coupled, loop.coupled)),
        probes=probes,
        error=jnp.where(take, error, loop.error),
        radius=jnp.where(take, radius, loop.radius),
        active=keep,
        num_steps=loop.num_steps + loop.active,
    )


def _factors(coupled: Sequence[jax.Array], b: jax.Array, c: jax.Array | None) -> list[jax.Array]:
    """Return ``T = I + bR + cR²`` with ``R = I − M``."""

    def factor(coupled: jax.Array, b: Any, c: Any = None) -> jax.Array:
        eye = spd.identity_like(coupled)
        deviation = eye - coupled
        linear = eye + b * deviation
        return linear if c is None else linear + c * spd.matmul(deviation, deviation)

    numbers = (spd.columns(each, coupled) for each in (b, c) if each is not None)
    return list(map(factor, coupled, *numbers))


def _distance_from_one(
    coupled: Sequence[jax.Array], probes: Sequence[jax.Array], num_steps: int
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Return ``‖I − M‖_F/√n``, an estimate of ``‖I − M‖_2`` and the vectors it came from."""
    deviations = [spd.identity_like(each) - each for each in coupled]
    radius, probes = power_iteration(deviations, probes, num_steps)
    return spd.frobenius(deviations), radius, probes
