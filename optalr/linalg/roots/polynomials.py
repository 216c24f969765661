"""Polynomials that drive a spectrum towards one, chosen for the part of it still far away.

One step of a coupled iteration multiplies the root's iterate by ``T(R) = 1 + bR + cR²``,
``R = I − M``, and so moves each eigenvalue m of M to ``m T(1−m)^p``. The Taylor polynomial of
``(1−R)^{-1/p}`` (b = 1/p, c = (p+1)/2p²; c = 0 for order 2) converges fastest near m = 1 but lifts
a tiny m by little: 3.5× at p = 2 and order 3 (2.25× at order 2). Larger coefficients lift it 8.3×
(4.4×). Their overshoot is bounded, so that the next step still contracts. T(0) = 1 always, so that
an eigenvalue that has converged stays where it is, even if the spectrum's spread was misjudged.

The same polynomials with p = 2 give the orthogonal factor of a matrix Y, where M = YᵀY.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The smallest eigenvalues that coefficients are computed for; between them they are interpolated.
_SMALLEST = np.array([1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.35, 0.5, 0.7])
# A step may move eigenvalues up to this; those above a half must stay above _LOWEST.
OVERSHOOT = 1.25
_LOWEST = 0.4


def taylor(p: int, order: int) -> tuple[float, float]:
    """Return the coefficients of the Taylor polynomial, order 2 or 3."""
    return 1 / p, ((p + 1) / (2 * p**2) if order == 3 else 0.0)


@functools.cache
def _coefficient_table(p: int, order: int) -> np.ndarray:
    """Return ``(b, c)`` for each of ``_SMALLEST``, by a grid search refined nine times."""
    start = np.array(taylor(p, order))
    rows = []
    for smallest in _SMALLEST:
        best, width = start, 4.0 * start
        for _ in range(9):
            steps = np.linspace(-1, 1, 13)
            b = best[0] + width[0] * steps[:, None]
            c = best[1] + width[1] * (steps[None, :] if order == 3 else np.zeros((1, 1)))
            cost = _cost(b, c, smallest=smallest, p=p)
            i, j = np.unravel_index(np.argmin(cost), cost.shape)
            best = np.array([b[i, 0], c[0, j]])
            width = width / 2.5
        rows.append(best)
    return np.stack(rows)


def _cost(b: np.ndarray, c: np.ndarray, *, smallest: float, p: int) -> np.ndarray:
    """Return the largest ``|log m'|`` over the spectrum, plus penalties for the two bounds."""
    low = np.geomspace(smallest, 1.0, 48)
    m = np.concatenate([low, np.linspace(1.0, min(OVERSHOOT, 2 - smallest), 12)])
    r = 1 - m
    factor = 1 + b[..., None] * r + c[..., None] * r**2
    moved = m * np.where(factor > 0, factor, 1e-9) ** p
    settled = np.where(m > 0.5, moved, 1.0).min(-1)
    penalty = np.maximum(moved.max(-1) - OVERSHOOT, 0) + np.maximum(_LOWEST - settled, 0)
    return np.abs(np.log(moved)).max(-1) + 1e3 * penalty


def coefficients(radius: jax.Array, p: int, order: int) -> tuple[jax.Array, jax.Array]:
    """Return ``(b, c)`` for a spectrum within ``radius`` of one; Taylor's below 0.3."""
    table = jnp.asarray(_coefficient_table(p, order), radius.dtype)
    grid = jnp.asarray(np.log(_SMALLEST), radius.dtype)
    where = jnp.log(jnp.clip(1 - radius, _SMALLEST[0], 1.0))
    b, c = (jnp.interp(where, grid, table[:, i]) for i in range(2))
    near = radius < 1 - _SMALLEST[-1]
    taylor_b, taylor_c = taylor(p, order)
    return jnp.where(near, taylor_b, b), jnp.where(near, taylor_c, c)
