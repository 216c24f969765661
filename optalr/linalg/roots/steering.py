"""What steers the iterations for roots: their polynomials, estimates of norms, limits of steps.

The polynomials drive a spectrum towards one. They are chosen for the part of it still far away.
One step of a coupled iteration multiplies the root's iterate by ``T(R) = 1 + bR + cR²``,
``R = I − M``, and so moves each eigenvalue m of M to ``m T(1−m)^p``. The Taylor polynomial of
``(1−R)^{-1/p}`` (b = 1/p, c = (p+1)/2p²; c = 0 for order 2) converges fastest near m = 1 but lifts
a tiny m by little: 3.5× at p = 2 and order 3 (2.25× at order 2). Larger coefficients lift it 8.3×
(4.4×). Their overshoot is bounded, so that the next step still contracts. T(0) = 1 always, so that
an eigenvalue that has converged stays where it is, even if the spectrum's spread was misjudged.

The same polynomials with p = 2 give the orthogonal factor of a matrix Y, where M = YᵀY.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.linalg import spd

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
    lead = (1,) * radius.ndim
    start, corners, bends, end = (
        array.reshape(*lead, *array.shape).astype(radius.dtype)
        for array in (*_interpolation(p, order), np.array(taylor(p, order)))
    )
    where = jnp.log(jnp.clip(1 - radius, float(_SMALLEST[0]), 1.0))
    # A line that is bent at each corner: far fewer operations than jnp.interp has.
    beyond = jnp.maximum(where[..., None] - corners, 0)
    far = start + jnp.sum(beyond[..., None] * bends, -2)
    found = jnp.where((radius < 1 - _SMALLEST[-1])[..., None], end, far)
    return found[..., 0], found[..., 1]


@functools.cache
def _interpolation(p: int, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the coefficients at the first corner, all corners but the last, and their bends."""
    table, corners = _coefficient_table(p, order), np.log(_SMALLEST)
    slopes = np.diff(table, axis=0) / np.diff(corners)[:, None]
    return table[0], corners[:-1], np.diff(slopes, axis=0, prepend=0 * slopes[:1])


def start_vectors(stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Return fixed random unit vectors ``(k, n, 1)``, with a share of every eigenvector."""
    return [
        jnp.broadcast_to(_unit_vector(stack.shape[-1], stack.dtype), (*stack.shape[:-1], 1))
        for stack in stacks
    ]


@functools.cache
def _unit_vector(n: int, dtype: Any) -> np.ndarray:
    """Return the vector; always the same array, of which a program then holds one constant."""
    # Irrational entries: a vector of signs can be orthogonal to eigenvectors of simple matrices.
    vector = np.random.default_rng(n).standard_normal((n, 1))
    return (vector / np.linalg.norm(vector)).astype(dtype)


def power_iteration(
    stacks: Sequence[jax.Array], vectors: Sequence[jax.Array], num_steps: int
) -> tuple[jax.Array, list[jax.Array]]:
    """Return a lower estimate of ``‖matrix‖_2``, ``(K,)``, and the improved vectors."""

    def step(_, carry):
        images = list(map(spd.matmul, stacks, carry[1]))
        norm = jnp.sqrt(spd.join([jnp.sum(jnp.square(image), (-2, -1)) for image in images]))
        # Only a matrix that is zero, so far as its dtype can tell, has a norm of zero.
        units = spd.columns(jnp.where(norm > 0, norm, 1), stacks)
        return norm, list(map(jnp.divide, images, units))

    start = jnp.ones(sum(stack.shape[0] for stack in stacks), stacks[0].dtype), list(vectors)
    return jax.lax.fori_loop(0, num_steps, step, start)


def largest_eigenvalue_bound(stacks: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return numbers between the largest eigenvalue and some 1.4 times it, and estimates of it.

    The two norms are certain bounds. The estimate by power iteration is one for all but contrived
    matrices: after ten steps from a random start it is within a factor ``n^{1/20}``.
    """
    estimate, _ = power_iteration(stacks, start_vectors(stacks), 10)
    squares = spd.join([jnp.sum(jnp.square(stack), (-2, -1)) for stack in stacks])
    rows = spd.join([jnp.max(jnp.sum(jnp.abs(stack), -1), -1) for stack in stacks])
    return jnp.minimum(jnp.minimum(jnp.sqrt(squares), rows), 1.3 * estimate), estimate


def has_stalled(before: jax.Array, error: jax.Array, stacks: Sequence[jax.Array]) -> jax.Array:
    """Return where a step no longer halves ``‖I − M‖_F/√n``, although the spectrum is near one.

    Far from one the error may rise for a step (an overshoot). Near it an error that does not fall
    is rounding. Near means all eigenvalues within a half of one. The norm makes this certain,
    unlike the estimate of the radius: a start vector may hold next to nothing of the one
    eigenvector that is still far away.
    """
    limits = [np.full(s.shape[0], 0.5 / s.shape[-1] ** 0.5, s.dtype) for s in stacks]
    near_one = before < np.concatenate(limits)
    return near_one & ~(error < 0.5 * before)


def max_steps(dtype: jnp.dtype, order: int) -> int:
    """Return more steps than a condition of 1/ε needs.

    The smallest eigenvalue is taken to grow 3.5 times a step (order 2) or 6 times (order 3), less
    than the 4.4 and 8.3 times that ``coefficients`` gives for p = 2. Eight more steps leave room
    for the convergence at the end.
    """
    lift = 3.5 if order == 2 else 6
    return int(np.ceil(-np.log(float(jnp.finfo(dtype).eps)) / np.log(lift))) + 8


def condition_estimate(largest: jax.Array, roots: Sequence[jax.Array], p: int) -> jax.Array:
    """Return ``‖A‖_2 ‖X‖_2^p`` from ``‖A‖_2``, and by power iteration, at most 1/ε."""
    norm, _ = power_iteration(roots, start_vectors(roots), 8)
    limit = 1 / float(jnp.finfo(norm.dtype).eps)
    return jnp.minimum(largest * jnp.power(norm, p), limit)
