"""Orthonormal columns by Cholesky decompositions, where an accelerator's QR would loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import refresh_eigenbasis
from optalr.linalg.roots.decompositions import cholesky_qr


def rotation(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def spans_agree(columns, reference):
    """Return how far the leading columns' spans are apart at worst, over all numbers of columns."""
    overlap = np.abs(reference.T @ columns)
    return float(np.abs(np.diag(overlap) - 1).max())


@pytest.mark.parametrize("n", [1, 8, 96])
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e7])
def test_a_scaled_basis_is_recovered(n, condition):
    basis = rotation(n, seed=n)
    scales = np.logspace(0, -np.log10(condition), n)
    columns = np.asarray(cholesky_qr(jnp.asarray(basis * scales, jnp.float32)), np.float64)
    np.testing.assert_allclose(columns.T @ columns, np.eye(n), atol=2e-6)
    assert spans_agree(columns, basis) < 1e-5


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_spans_are_those_of_householder(condition):
    n = 64
    left, right = rotation(n, seed=1), rotation(n, seed=2)
    matrix = left * np.logspace(0, -np.log10(condition), n) @ right.T
    reference = np.linalg.qr(matrix)[0]
    columns = np.asarray(cholesky_qr(jnp.asarray(matrix, jnp.float32)), np.float64)
    np.testing.assert_allclose(columns.T @ columns, np.eye(n), atol=2e-6)
    # A direction of relative size 1/κ is known to κ ε.
    assert spans_agree(columns, reference) < max(1e-5, (condition * 2e-6) ** 2)


def test_stacks_of_any_shape_and_float64():
    with jax.enable_x64(True):
        matrices = np.random.default_rng(0).standard_normal((2, 3, 5, 5))
        columns = np.asarray(cholesky_qr(jnp.asarray(matrices)))
        assert columns.dtype == np.float64
        eye = np.broadcast_to(np.eye(5), columns.shape)
        np.testing.assert_allclose(np.swapaxes(columns, -1, -2) @ columns, eye, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 3, 11])
def test_a_singular_matrix_has_a_basis_all_the_same(rank):
    basis = rotation(12, seed=5)
    values = np.where(np.arange(12) < rank, 1.0, 0.0)
    matrix = jnp.asarray(basis * values @ basis.T, jnp.float32)
    start = jnp.asarray(basis, jnp.float32)
    added = jnp.finfo(jnp.float32).eps * jnp.linalg.norm(matrix)
    found = np.asarray(cholesky_qr(matrix @ start + jnp.maximum(added, 1e-12) * start), np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-5)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_no_accelerator_runs_a_qr(platform):
    matrix = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    text = refresh_eigenbasis.trace(matrix, matrix).lower(lowering_platforms=(platform,)).as_text()
    assert "holesky" in text or "potrf" in text
    for name in ("geqrf", "householder", "Qr", "orgqr"):
        assert name not in text
