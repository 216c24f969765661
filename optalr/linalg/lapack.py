"""Decompositions of stacks that cannot block a CPU: there, LAPACK gets one matrix at a time.

On a CPU, jaxlib's kernels for stacks (seen in 0.10.2) split a large stack into tasks for the thread
pool that runs the program, and wait for them inside one of its threads. Two such calls that do not
depend on each other, in a loop's body or a branch, can then take every thread of a machine with few
cores and wait for ever. A call for one matrix runs in the thread that makes it. The loop costs
little: on two cores, for 2 to 16 matrices of 64 to 1024 rows, eigh took at most the time of the
stacked call, QR and Cholesky at most 1.2 times and triangular solves at most 1.5 times that time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues, ascending, and eigenvectors of exactly symmetric matrices."""
    return _by_platform(_eigh, matrix)


def cholesky(matrix: jax.Array) -> jax.Array:
    """Return the lower factors of exactly symmetric matrices; NaN where there are none."""
    return _by_platform(_cholesky, matrix)


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Return the orthogonal factors of QR decompositions."""
    return _by_platform(_orthonormal, matrix)


def solve_lower_right(lower: jax.Array, right: jax.Array) -> jax.Array:
    """Return ``right · lower^{-1}``."""
    return _by_platform(_solve_lower_right, lower, right)


def _eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


def _cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(matrix, symmetrize_input=False)


def _orthonormal(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


def _solve_lower_right(lower: jax.Array, right: jax.Array) -> jax.Array:
    return jax.lax.linalg.triangular_solve(lower, right, left_side=False, lower=True)


def _by_platform(kernel: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Call ``kernel`` on whole stacks, on a CPU in a loop over their matrices."""
    looped = functools.partial(_looped, kernel)
    return jax.lax.platform_dependent(*stacks, cpu=looped, default=kernel)


def _looped(kernel: Callable[..., Any], *stacks: jax.Array) -> Any:
    """Call ``kernel`` on one matrix after the other."""
    # Sequential also under a vmap of the caller's, which would otherwise make a stack again.
    one = jax.custom_batching.sequential_vmap(kernel)
    for _ in range(stacks[0].ndim - 2):
        one = jax.vmap(one)
    return one(*stacks)
