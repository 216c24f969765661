"""Inverse roots through the eigendecomposition: any power, also a traced one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.linalg import lapack, spd


class MethodResult(NamedTuple):
    """What a method returns for a normalized stack."""

    root: jax.Array  # (..., n, n)
    residual: jax.Array  # (...)
    condition: jax.Array  # (...), λ_max/λ_min, at most 1/ε
    num_steps: jax.Array  # (...) int32
    basis: jax.Array | None = None  # (..., n, n), where the caller wants it


def floor_spectrum(values: jax.Array) -> jax.Array:
    """Raise eigenvalues to at least ε times the largest: below that they are rounding noise."""
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    return jnp.maximum(values, jnp.finfo(values.dtype).eps * largest)


def root_from_eigenbasis(
    matrix: jax.Array, values: jax.Array, vectors: jax.Array, p: Any
) -> MethodResult:
    """Return ``V λ^{-1/p} Vᵀ`` and how far it is from the root."""
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
    return MethodResult(root, residual, condition, jnp.ones(residual.shape, jnp.int32))


def eigh_root(matrix: jax.Array, p: Any, *, keep_basis: bool = False) -> MethodResult:
    """Return the inverse p-th root of a normalized stack by a full eigendecomposition."""
    values, vectors = lapack.eigh(matrix)
    result = root_from_eigenbasis(matrix, values, vectors, p)
    return result._replace(basis=vectors) if keep_basis else result


def refreshed_root(matrix: jax.Array, basis: jax.Array, p: Any) -> MethodResult:
    """Return the inverse p-th root in a basis improved by one QR step, and that basis."""
    vectors = orthogonal_step(matrix, basis)
    values = jnp.sum(vectors * spd.matmul(matrix, vectors), -2)
    return root_from_eigenbasis(matrix, values, vectors, p)._replace(basis=vectors)


def orthogonal_step(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """Return ``qr(A Q)`` with the columns of Q sorted by falling ``diag(QᵀAQ)``."""
    image = spd.matmul(matrix, vectors)
    order = jnp.argsort(-jnp.sum(vectors * image, -2), axis=-1)
    return lapack.orthonormal(jnp.take_along_axis(image, order[..., None, :], -1))
