"""Inverse roots through the eigendecomposition: any power, also a traced one."""

from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg import lapack, spd
from optalr.linalg.roots.interface import MethodResult, RootTask


def eigh_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th root of a normalized stack by a full eigendecomposition."""
    return eigh_root_and_basis(task)._replace(basis=None)


def eigh_root_and_basis(task: RootTask) -> MethodResult:
    """Return what ``eigh_root`` does, and the eigenvectors as ``basis``."""
    values, vectors = lapack.eigh(task.matrix)
    return _root_in_basis(task, values, vectors)


def refreshed_root(task: RootTask) -> MethodResult:
    """Return the inverse p-th root in a basis improved by one QR step, and that basis."""
    vectors = orthogonal_step(task.matrix, task.basis)
    image = spd.matmul(task.matrix, vectors)
    return _root_in_basis(task, diagonal_in(vectors, image), vectors)


def floor_spectrum(values: jax.Array) -> jax.Array:
    """Raise eigenvalues to at least ε times the largest: below that they are rounding noise."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.maximum(values, jnp.finfo(values.dtype).eps * largest)


def diagonal_in(vectors: jax.Array, image: jax.Array) -> jax.Array:
    """Return ``diag(QᵀAQ)`` from the basis Q and its image ``AQ``."""
    return jnp.sum(vectors * image, -2)


def orthogonal_step(matrix: jax.Array, vectors: Any) -> jax.Array:
    """Return ``qr(A Q)`` with the columns of Q sorted by falling ``diag(QᵀAQ)``."""
    image = spd.matmul(matrix, vectors)
    order = jnp.argsort(-diagonal_in(vectors, image), axis=-1)
    return lapack.orthonormal(jnp.take_along_axis(image, order[..., None, :], -1))


def _root_in_basis(task: RootTask, values: jax.Array, vectors: jax.Array) -> MethodResult:
    """Return ``V λ^{-1/p} Vᵀ``, how far it is from the root, and V."""
    matrix, p = task.matrix, task.power
    values = floor_spectrum(values)
    # One power, or one a matrix where p is traced.
    power = jnp.asarray(-1 / p, values.dtype)
    inverse = jnp.power(values, power[..., None] if power.ndim else power)
    root = spd.matmul(vectors * inverse[..., None, :], spd.transpose(vectors))
    whole = spd.whole_number(p)
    if whole is not None:
        residual = spd.root_residual(matrix, root, whole)
    else:
        # X^p is not a finite product. The same eigenpairs must whiten A: W = V λ^{-1/2}.
        whitened = vectors * jax.lax.rsqrt(values)[..., None, :]
        gram = spd.matmul(spd.transpose(whitened), spd.matmul(matrix, whitened))
        residual = spd.frobenius(gram - spd.identity_like(gram))
    condition = values.max(-1) / values.min(-1)
    num_steps = jnp.ones(residual.shape, jnp.int32)
    return MethodResult(root, residual, condition, num_steps, basis=vectors)
