"""MINRES against SciPy iterate by iterate; its trees, its stops, its memory, its errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import minres, minres_step
from tests.linalg.systems import (
    DEFINITE,
    INDEFINITE,
    RHS,
    SINGULAR,
    scipy_iterates,
    solve,
    symmetric,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("A", "b"),
    [
        (DEFINITE, RHS),
        (INDEFINITE, RHS),
        (SINGULAR, SINGULAR @ RHS),
        (SINGULAR, RHS),
    ],
    ids=["definite", "indefinite", "singular consistent", "singular inconsistent"],
)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_every_iterate_equals_scipys(A, b, damping):
    expected = scipy_iterates(A, b, len(b), shift=damping)
    for k in (1, 3, 8):
        result = solve(A, b, k, damping=damping)
        reached = expected[min(k, len(expected)) - 1]
        # Near the end of an inconsistent system SciPy walks on in the null space; compare before.
        if np.linalg.norm(reached) < 1e3 * np.linalg.norm(expected[0]):
            np.testing.assert_allclose(result.solution, reached, rtol=1e-6, atol=1e-9)
        residual = b - A @ result.solution - damping * result.solution
        assert result.residual_norms.shape == (k + 1,)
        np.testing.assert_allclose(result.residual_norms[0], np.linalg.norm(b))
        np.testing.assert_allclose(
            result.residual_norms[-1], np.linalg.norm(residual), rtol=1e-6, atol=1e-10
        )
        np.testing.assert_allclose(result.residual, residual, atol=1e-9)
        assert np.all(np.diff(result.residual_norms) <= 0)


@pytest.mark.usefixtures("x64")
def test_preconditioned_iterates_equal_scipys():
    M = symmetric(np.linspace(0.5, 3.0, 10), seed=3)
    b = RHS
    expected = scipy_iterates(INDEFINITE, b, 6, M=M)
    for k in (1, 2, 4, 6):
        result = solve(INDEFINITE, b, k, preconditioner=lambda r: jnp.asarray(M) @ r)
        np.testing.assert_allclose(result.solution, expected[k - 1], rtol=1e-8)
        residual = b - INDEFINITE @ result.solution
        np.testing.assert_allclose(result.residual, residual, atol=1e-10)
        np.testing.assert_allclose(
            result.residual_norms[-1], np.sqrt(residual @ M @ residual), rtol=1e-8
        )
    exact = solve(
        INDEFINITE @ INDEFINITE,
        b,
        2,
        preconditioner=lambda r: jnp.linalg.solve(jnp.asarray(INDEFINITE @ INDEFINITE), r),
    )
    np.testing.assert_allclose(
        exact.solution, np.linalg.solve(INDEFINITE @ INDEFINITE, b), rtol=1e-7
    )
    assert float(exact.residual_norms[1]) < 1e-10 * float(exact.residual_norms[0])


def test_hand_computed_on_two_by_two():
    # A b = (1, 2), so the first iterate is 3/5 of b; the second is exact.
    A, b = np.diag([1.0, 2.0]).astype(np.float32), np.ones(2, np.float32)
    np.testing.assert_allclose(solve(A, b, 1).solution, [0.6, 0.6], rtol=1e-6)
    np.testing.assert_allclose(solve(A, b, 2).solution, [1.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(solve(A, b, 1).residual_norms, [np.sqrt(2), np.sqrt(0.2)], rtol=1e-6)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_minres_step_equals_the_general_one(damping):
    A = INDEFINITE.astype(np.float32)
    for seed in range(5):
        b = np.random.default_rng(seed).standard_normal(10).astype(np.float32)
        closed = minres_step(lambda v: A @ v, jnp.asarray(b), damping=damping)
        general = solve(A, b, 1, damping=damping)
        for field in ("solution", "residual_norms", "residual", "trusted"):
            np.testing.assert_allclose(
                getattr(closed, field), getattr(general, field), rtol=2e-4, atol=1e-5
            )
        for field in ("num_steps", "nonpositive_curvature", "failed"):
            assert getattr(closed, field) == getattr(general, field)


def test_pytrees_of_any_shape():
    A = symmetric(np.linspace(1, 2, 6)).astype(np.float32)
    flat = np.arange(1.0, 7.0, dtype=np.float32)
    tree = {"w": jnp.asarray(flat[:4]).reshape(2, 2), "b": [jnp.asarray(flat[4:])]}

    def matvec(v):
        out = jnp.asarray(A) @ jnp.concatenate([v["w"].ravel(), v["b"][0]])
        return {"w": out[:4].reshape(2, 2), "b": [out[4:]]}

    result = minres(matvec, tree, num_steps=6)
    expected = np.linalg.solve(A, flat)
    np.testing.assert_allclose(result.solution["w"].ravel(), expected[:4], rtol=1e-4)
    np.testing.assert_allclose(result.solution["b"][0], expected[4:], rtol=1e-4)


def test_stopping_early_neither_recompiles_nor_changes_the_solution():
    A = symmetric(np.r_[np.ones(6), 3.0, 3.0, 8.0, 8.0]).astype(np.float32)  # three clusters
    b = RHS.astype(np.float32)
    solver = jax.jit(partial(solve, steps=10))
    for tol in (0.0, 1e-4, 0.5):
        result = solver(A, b, tol=jnp.float32(tol))
        assert int(result.num_steps) <= 3 if tol else int(result.num_steps) <= 6
        assert float(jnp.linalg.norm(b - A @ result.solution)) <= max(tol, 1e-4) * np.linalg.norm(b)
        assert np.all(np.diff(result.residual_norms) <= 0)
    assert solver._cache_size() == 1
    early = solver(A, b, tol=jnp.float32(0.5))
    same = solve(A, b, int(early.num_steps))
    np.testing.assert_allclose(early.solution, same.solution, rtol=1e-5)


def test_eigenvector_is_solved_in_one_step():
    result = solve(np.diag([2.0, 3.0]).astype(np.float32), np.array([4.0, 0.0], np.float32), 5)
    np.testing.assert_allclose(result.solution, [2.0, 0.0], rtol=1e-6)
    assert int(result.num_steps) == 1


def test_a_preconditioner_made_for_the_call_leaks_nothing():
    def step(diagonal, b):
        options = {"num_steps": 2, "preconditioner": lambda r: r / diagonal}
        return minres(lambda v: diagonal * v, b, **options).solution

    with jax.checking_leaks():
        solution = jax.jit(step)(jnp.array([1.0, 4.0, 9.0]), jnp.ones(3))
    np.testing.assert_allclose(solution, [1, 1 / 4, 1 / 9], rtol=1e-5)


def test_works_under_vmap_and_scan():
    matrices = jnp.stack(
        [jnp.asarray(symmetric(np.linspace(1, c, 6)), jnp.float32) for c in (2, 9)]
    )
    bs = jnp.ones((2, 6))
    batched = jax.vmap(lambda A, b: minres(lambda v: A @ v, b, num_steps=4).solution)(matrices, bs)
    for i in range(2):
        np.testing.assert_allclose(batched[i], solve(matrices[i], bs[i], 4).solution, rtol=1e-4)
    _, scanned = jax.lax.scan(
        lambda c, Ab: (c, minres(lambda v: Ab[0] @ v, Ab[1], num_steps=4).solution),
        0,
        (matrices, bs),
    )
    np.testing.assert_allclose(scanned, batched, rtol=1e-4)


def test_memory_does_not_grow_with_the_steps():
    A, b = jnp.ones((4, 4)), jnp.ones((4, 1 << 14))

    def bytes_of(k):
        solver = jax.jit(lambda A, b: minres(lambda v: A @ v, b, num_steps=k).solution)
        return solver.lower(A, b).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(12) <= bytes_of(4) + 2 * b.nbytes


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_steps": 2.0}, TypeError, "num_steps.*static"),
        ({"num_steps": 2, "tol": 1.0}, ValueError, "tol"),
        ({"num_steps": 2, "tol": -0.1}, ValueError, "tol"),
        ({"num_steps": 2, "damping": float("nan")}, ValueError, "damping"),
    ],
)
def test_bad_arguments_are_named(kwargs, error, match):
    with pytest.raises(error, match=match):
        minres(lambda v: v, jnp.ones(2), **kwargs)


def test_bad_systems_are_named():
    with pytest.raises(TypeError, match="b must hold real floating"):
        minres(lambda v: v, jnp.ones(2, jnp.int32), num_steps=1)
    with pytest.raises(TypeError, match="b must hold real floating"):
        minres(lambda v: v, jnp.ones(2, jnp.complex64), num_steps=1)
    with pytest.raises(ValueError, match="b has no leaves"):
        minres(lambda v: v, {}, num_steps=1)
    with pytest.raises(ValueError, match="matvec must keep the structure"):
        minres(lambda v: {"a": v}, jnp.ones(2), num_steps=1)
    with pytest.raises(ValueError, match="matvec must keep the shapes"):
        minres(lambda v: v[:1], jnp.ones(2), num_steps=1)
