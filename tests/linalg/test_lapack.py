import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import eigenbasis, inverse_root, refresh_eigenbasis
from optalr.linalg.roots import decompositions

# What LAPACK is handed, in compiled HLO: the first operand of its custom calls.
CALL = re.compile(r'custom-call\(.*custom_call_target="lapack_(\w+)"')
SHAPE = re.compile(r"f32\[([\d,]*)\]")


@pytest.fixture
def stack() -> jax.Array:
    factors = np.random.default_rng(0).normal(size=(2, 3, 40, 40)).astype(np.float32)
    return jnp.asarray(factors @ factors.swapaxes(-1, -2) + np.eye(40, dtype=np.float32))


def lapack_batches(function, *arguments) -> list[int]:
    """Return how many matrices each LAPACK call of a compiled function is handed."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    batches = []
    for line in text.splitlines():
        if CALL.search(line):
            shapes = [shape.split(",") for shape in SHAPE.findall(line)]
            matrices = [shape[:-2] for shape in shapes if shape[-2:] == ["40", "40"]]
            batches += [int(np.prod([int(size) for size in lead])) for lead in matrices]
    return batches


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about LAPACK")
@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("method", ["eigh", "cholesky_polar", "eigenbasis"])
def test_roots_hand_lapack_a_matrix_at_a_time(stack, method, vmapped):
    def roots(stack):
        return inverse_root(stack, method=method).root

    batches = lapack_batches(jax.vmap(roots) if vmapped else roots, stack)
    assert batches
    assert set(batches) == {1}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about LAPACK")
def test_bases_hand_lapack_a_matrix_at_a_time(stack):
    def bases(stack):
        basis = eigenbasis(stack)
        return refresh_eigenbasis(stack, basis.vectors)

    assert set(lapack_batches(jax.vmap(bases), stack)) == {1}


def test_stacks_agree_with_numpy(stack):
    values, vectors = decompositions.eigh(stack)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(stack), rtol=1e-4)
    rebuilt = vectors * values[..., None, :] @ vectors.swapaxes(-1, -2)
    np.testing.assert_allclose(rebuilt, stack, rtol=1e-4, atol=1e-3)
    lower = decompositions.cholesky(stack)
    np.testing.assert_allclose(lower, np.linalg.cholesky(stack), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        decompositions.solve_lower_right(lower, stack) @ lower, stack, rtol=1e-3, atol=1e-3
    )
    orthogonal = decompositions.orthonormal(stack)
    gram = orthogonal.swapaxes(-1, -2) @ orthogonal
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(40), gram.shape), atol=1e-5)
