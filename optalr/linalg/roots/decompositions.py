"""Decompositions of stacks that cannot block a CPU, and the inverse roots that eigh gives.

On a CPU, jaxlib's kernels for stacks (seen in 0.10.2) split a large stack into tasks for the thread
pool that runs the program, and wait for them inside one of its threads. Two such calls that do not
depend on each other, in a loop's body or a branch, can then take every thread of a machine with few
cores and wait for ever. A call for one matrix runs in the thread that makes it. So LAPACK gets one
matrix at a time. The loop costs little: on two cores, for 2 to 16 matrices of 64 to 1024 rows, eigh
took at most the time of the stacked call, QR and Cholesky at most 1.2 times and triangular solves
at most 1.5 times that time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg import spd
from optalr.linalg.spd import MethodResult, RootTask


def _looped_on_cpu(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``kernel`` take whole stacks, on a CPU in a loop over their matrices.

    Where the caller is compiled for one kind of device it says which by ``on_cpu``.
    """

    def looped(*stacks: jax.Array) -> Any:
        # Sequential also under a vmap of the caller's, which would otherwise make a stack again.
        one = jax.custom_batching.sequential_vmap(kernel)
        lead = stacks[0].shape[:-2]
        if math.prod(lead) == 1:
            found = one(*(stack.reshape(stack.shape[-2:]) for stack in stacks))
            return jax.tree.map(lambda x: x.reshape(*lead, *x.shape), found)
        for _ in lead:
            one = jax.vmap(one)
        return one(*stacks)

    @functools.wraps(kernel)
    def anywhere(*stacks: jax.Array, on_cpu: bool | None = None) -> Any:
        if on_cpu is None:
            return jax.lax.platform_dependent(*stacks, cpu=looped, default=kernel)
        return (looped if on_cpu else kernel)(*stacks)

    return anywhere


@_looped_on_cpu
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues, ascending, and eigenvectors of exactly symmetric matrices."""
    return jnp.linalg.eigh(matrix, symmetrize_input=False)


@_looped_on_cpu
def cholesky(matrix: jax.Array) -> jax.Array:
    """Return the lower factors of exactly symmetric matrices; NaN where there are none."""
    return jnp.linalg.cholesky(matrix, symmetrize_input=False)


@_looped_on_cpu
def solve_lower_right(lower: jax.Array, right: jax.Array) -> jax.Array:
    """Return ``right · lower^{-1}``."""
    return jax.lax.linalg.triangular_solve(lower, right, left_side=False, lower=True)


def orthonormal(matrix: jax.Array) -> jax.Array:
    """Return the orthogonal factors of QR decompositions of square matrices of full rank.

    Where LAPACK is at hand, by Householder reflections. jax's QR loops over the columns elsewhere,
    and takes seconds for what Cholesky factors do in milliseconds.
    """
    return jax.lax.platform_dependent(matrix, cpu=_householder_qr, default=cholesky_qr)


def cholesky_qr(matrix: jax.Array) -> jax.Array:
    """Return the orthogonal factors of QR decompositions, by three Cholesky decompositions.

    ``X ← X R^{-1}`` with ``RᵀR = XᵀX`` is orthonormal up to κ²ε, for X of condition κ. A first pass
    with a shift, ``RᵀR = XᵀX + s I``, brings any κ up to about 1/ε down to where two plain passes
    finish. Each R is upper triangular, so the leading columns span what they did. The columns are
    scaled to length one first: those of ``A Q`` for a Q near the eigenvectors are then nearly
    orthonormal, whatever the eigenvalues.

    Args:
      matrix: ``(..., n, n)``, of full rank; of a column of zeros nothing can be made.

    Returns:
      ``(..., n, n)``; NaN where a matrix is too near to a singular one.

    Reference: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, "Shifted Cholesky QR for computing
      the QR factorization of ill-conditioned matrices", 2020. Their shift is for the worst case,
      and in float32 larger than the matrix.
    """
    lengths = jnp.sqrt(jnp.sum(jnp.square(matrix), -2, keepdims=True))
    columns = matrix / jnp.where(lengths > 0, lengths, 1)
    n = matrix.shape[-1]
    # Rounding changes entries of the Gram matrix, whose diagonal is 1, by some √n ε; its smallest
    # eigenvalue by n ε at most, but for a small factor.
    shift = 4 * n * jnp.finfo(matrix.dtype).eps
    for extra in (shift, 0.0, 0.0):
        gram = spd.symmetric_part(spd.matmul(spd.transpose(columns), columns))
        lower = cholesky(gram + extra * spd.identity_like(gram))
        columns = solve_transposed_right(lower, columns)
    return columns


@_looped_on_cpu
def _householder_qr(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.qr(matrix)[0]


@_looped_on_cpu
def solve_transposed_right(lower: jax.Array, right: jax.Array) -> jax.Array:
    """Return ``right · lower^{-T}``."""
    return jax.lax.linalg.triangular_solve(
        lower, right, left_side=False, lower=True, transpose_a=True
    )


def eigh_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th roots of normalized stacks, for any p, also a traced one."""
    return eigh_root_and_basis(task)._replace(bases=None)


def eigh_root_and_basis(task: RootTask) -> MethodResult:
    """Return what ``eigh_root`` does, and the eigenvectors as ``bases``."""
    pairs = [eigh(stack, on_cpu=task.on_cpu) for stack in task.stacks]
    values, vectors = zip(*pairs, strict=True)
    return _roots_in_bases(task, values, vectors)


def refreshed_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th roots in bases improved by one QR step, and those bases."""
    vectors = list(map(orthogonal_step, task.stacks, task.bases))
    images = map(spd.matmul, task.stacks, vectors)
    return _roots_in_bases(task, list(map(diagonal_in, vectors, images)), vectors)


def floor_spectrum(values: jax.Array) -> jax.Array:
    """Raise eigenvalues to at least ε times the largest: below that they are rounding noise."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.maximum(values, jnp.finfo(values.dtype).eps * largest)


def diagonal_in(vectors: jax.Array, image: jax.Array) -> jax.Array:
    """Return ``diag(QᵀAQ)`` from the basis Q and its image ``AQ``."""
    return jnp.sum(vectors * image, -2)


def orthogonal_step(matrix: jax.Array, vectors: Any) -> jax.Array:
    """Return ``qr((A + δ) Q)`` with the columns of Q sorted by falling ``diag(QᵀAQ)``.

    Both are ``(k, n, n)``. δ is as large as the rounding errors of ``A Q``, so that a singular A
    leaves no column of zeros.
    """
    image = spd.matmul(matrix, vectors)
    order = jnp.argsort(-diagonal_in(vectors, image), axis=-1)
    added = jnp.finfo(matrix.dtype).eps * spd.column(spd.frobenius([matrix]))
    return orthonormal(jnp.take_along_axis(image + added * vectors, order[..., None, :], -1))


def _roots_in_bases(
    task: RootTask, values: Sequence[jax.Array], vectors: Sequence[jax.Array]
) -> MethodResult:
    """Return ``V λ^{-1/p} Vᵀ``, how far each is from the root, and V."""
    stacks = task.stacks
    largest = spd.join([jnp.max(jnp.abs(each), -1) for each in values])
    smallest = spd.join([jnp.min(each, -1) for each in values])
    # As in ``floor_spectrum``, for all matrices at once.
    floor = jnp.finfo(largest.dtype).eps * largest
    condition = largest / jnp.maximum(smallest, floor)
    floors = spd.split(floor[:, None], stacks)
    values = list(map(jnp.maximum, values, floors))
    # One power, or one a matrix where p is traced.
    power = jnp.asarray(-1 / task.power, largest.dtype)
    powers = spd.split(power[:, None], stacks) if power.ndim else [power] * len(stacks)
    roots = [
        spd.matmul(v * jnp.power(w, power)[..., None, :], spd.transpose(v))
        for v, w, power in zip(vectors, values, powers, strict=True)
    ]
    if isinstance(task.power, int):
        residual = spd.root_residuals(stacks, roots, task.power)
    else:
        residual = _whitening_residuals(stacks, values, vectors)
    num_steps = jnp.ones(residual.shape, jnp.int32)
    return MethodResult(roots, residual, condition, num_steps, bases=list(vectors))


def _whitening_residuals(
    stacks: Sequence[jax.Array], values: Sequence[jax.Array], vectors: Sequence[jax.Array]
) -> jax.Array:
    """Return how far ``V λ^{-1/2}`` is from whitening each matrix.

    It judges the eigenpairs where ``X^p`` is not a finite product.
    """

    def error(matrix: jax.Array, values: jax.Array, vectors: jax.Array) -> jax.Array:
        whitened = vectors * jax.lax.rsqrt(values)[..., None, :]
        gram = spd.matmul(spd.transpose(whitened), spd.matmul(matrix, whitened))
        return gram - spd.identity_like(gram)

    return spd.frobenius(list(map(error, stacks, values, vectors)))
