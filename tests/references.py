"""Dense float64 oracles, written for plainness: NumPy only, nothing from the package."""

import jax
import jax.experimental
import numpy as np

# Public under this name only since jax 0.8.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64


def dense_inverse_root(matrix, p=2.0, damping=0.0):
    """Return ``(A + damping·I)^{-1/p}`` of a stack in float64, by eigenvalues."""
    matrix = np.asarray(matrix, np.float64)
    n = matrix.shape[-1]
    damping = np.asarray(damping, np.float64)[..., None, None]
    values, vectors = np.linalg.eigh(matrix + damping * np.eye(n))
    return (vectors * values[..., None, :] ** (-1.0 / p)) @ np.swapaxes(vectors, -1, -2)


def dense_root_residual(matrix, root, damping=0.0):
    """Return ``‖XAX − I‖_F/√n`` in float64, for p = 2."""
    matrix, root = np.asarray(matrix, np.float64), np.asarray(root, np.float64)
    n = matrix.shape[-1]
    damped = matrix + np.asarray(damping, np.float64)[..., None, None] * np.eye(n)
    return np.linalg.norm(root @ damped @ root - np.eye(n), axis=(-2, -1)) / np.sqrt(n)


def dense_kronecker_power(left, right, power, damping=0.0):
    """Return ``(right ⊗ left + damping·I)^power``, which acts on column-stacked matrices."""
    product = np.kron(np.asarray(right, np.float64), np.asarray(left, np.float64))
    values, vectors = np.linalg.eigh(product)
    return (vectors * (values + damping) ** power) @ vectors.T


def column_stack(matrix):
    """Return ``vec(G)``, the columns of G below each other."""
    return np.asarray(matrix, np.float64).reshape(-1, order="F")


def random_spd(seed, n, condition=1e2, scale=1.0, spectrum="geometric", dtype=np.float32):
    """Return a symmetric matrix with a known spectrum, largest eigenvalue ``scale``.

    ``spectrum``: ``"geometric"``, ``"clustered"`` (two clusters, condition apart) or
    ``"low_rank"`` (a quarter of the eigenvalues are zero).
    """
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    if spectrum == "geometric":
        values = np.geomspace(1.0, 1.0 / condition, n) if n > 1 else np.ones(1)
    elif spectrum == "clustered":
        values = np.where(np.arange(n) < (n + 1) // 2, 1.0, 1.0 / condition)
        values = values * (1 + 1e-6 * rng.standard_normal(n))
    elif spectrum == "low_rank":
        values = np.where(np.arange(n) < max(1, 3 * n // 4), 1.0, 0.0)
    else:
        raise ValueError(spectrum)
    matrix = (basis * values) @ basis.T * scale
    return (0.5 * (matrix + matrix.T)).astype(dtype)
