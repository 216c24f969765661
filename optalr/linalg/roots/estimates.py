"""What steers the iterations for roots: estimates of norms, distances from one, limits of steps."""

import jax
import jax.numpy as jnp
import numpy as np

from optalr.linalg import spd


def start_vector(matrix: jax.Array) -> jax.Array:
    """Return a fixed random unit vector ``(..., n, 1)``, which has a share of every eigenvector."""
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

    The two norms are certain bounds. The estimate by power iteration is one for all but contrived
    matrices: after ten steps from a random start it is within a factor ``n^{1/20}``.
    """
    estimate, _ = power_iteration(matrix, start_vector(matrix), 10)
    frobenius = jnp.sqrt(jnp.sum(jnp.square(matrix), (-2, -1)))
    rows = jnp.max(jnp.sum(jnp.abs(matrix), -1), -1)
    return jnp.minimum(jnp.minimum(frobenius, rows), 1.3 * estimate)


def near_one(error: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return where a spectrum lies within a half of one, by ``error = ‖I − M‖_F/√n``.

    This is certain, unlike the estimate of the radius: a start vector may hold next to nothing of
    the one eigenvector that is still far away.
    """
    return error * matrix.shape[-1] ** 0.5 < 0.5


def has_stalled(before: jax.Array, error: jax.Array, matrix: jax.Array) -> jax.Array:
    """Return where a step no longer halves the error, although the spectrum is near one.

    Far from one the error may rise for a step (an overshoot). Near it an error that does not fall
    is rounding.
    """
    return near_one(before, matrix) & ~(error < 0.5 * before)


def max_steps(dtype: jnp.dtype, order: int) -> int:
    """Return more steps than a condition of 1/ε needs.

    The smallest eigenvalue is taken to grow 3.5 times a step (order 2) or 6 times (order 3), less
    than the 4.4 and 8.3 times that ``polynomials`` gives for p = 2. Eight more steps leave room for
    the convergence at the end.
    """
    lift = 3.5 if order == 2 else 6
    return int(np.ceil(-np.log(float(jnp.finfo(dtype).eps)) / np.log(lift))) + 8


def condition_estimate(matrix: jax.Array, root: jax.Array, p: int) -> jax.Array:
    """Return ``‖A‖_2 ‖X‖_2^p`` by power iteration, at most 1/ε."""
    start = start_vector(matrix)
    largest, _ = power_iteration(matrix, start, 8)
    norm, _ = power_iteration(root, start, 8)
    limit = 1 / float(jnp.finfo(matrix.dtype).eps)
    return jnp.minimum(largest * jnp.power(norm, p), limit)
