"""MINRES where it is hard: zeros, scales, large eigenvalues, half precision, what is not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import minres, minres_step
from tests.linalg.systems import INDEFINITE, RHS, SINGULAR, scipy_iterates, solve, symmetric


@pytest.mark.usefixtures("x64")
def test_inconsistent_system_ends_in_a_least_squares_solution():
    b = RHS
    result = solve(SINGULAR, b, 14)
    residual = b - SINGULAR @ result.solution
    np.testing.assert_allclose(SINGULAR @ residual, np.zeros(10), atol=1e-7)
    assert float(jnp.linalg.norm(result.solution)) < 1e3
    assert not bool(result.failed)


@pytest.mark.parametrize("steps", [1, 5])
def test_zero_right_hand_side_gives_zero(steps):
    result = solve(INDEFINITE.astype(np.float32), np.zeros(10, np.float32), steps)
    assert not np.any(result.solution)
    assert not np.any(result.residual_norms)
    assert int(result.num_steps) == 0
    assert not bool(result.failed)
    assert not np.any(minres_step(lambda v: v, jnp.zeros(3)).solution)


def test_zero_matrix_gives_zero():
    result = solve(np.zeros((3, 3), np.float32), np.ones(3, np.float32), 4)
    assert not np.any(result.solution)
    assert not bool(result.failed)
    assert not np.any(minres_step(lambda v: 0 * v, jnp.ones(3)).solution)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_right_hand_side_does_not_matter(scale):
    A = INDEFINITE.astype(np.float32)
    b = RHS.astype(np.float32)
    expected = solve(A, b, 4).solution
    np.testing.assert_allclose(
        solve(A, np.float32(scale) * b, 4).solution, scale * expected, rtol=1e-3
    )
    np.testing.assert_allclose(
        minres_step(lambda v: A @ v, jnp.asarray(np.float32(scale) * b)).solution,
        np.float32(scale) * minres_step(lambda v: A @ v, jnp.asarray(b)).solution,
        rtol=1e-4,
    )


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_matrix_does_not_matter(scale):
    A, b = INDEFINITE.astype(np.float32), RHS.astype(np.float32)
    for take, k in ((minres, 4), (minres_step, None)):
        options = {} if k is None else {"num_steps": k}
        plain, scaled = (
            take(lambda v, A=matrix: jnp.asarray(A) @ v, jnp.asarray(b), **options)
            for matrix in (A, A * np.float32(scale))
        )
        assert not scaled.failed
        np.testing.assert_allclose(scaled.solution * scale, plain.solution, rtol=1e-3)
        np.testing.assert_allclose(scaled.residual_norms, plain.residual_norms, rtol=1e-4)


@pytest.mark.parametrize("low", [[], np.linspace(-2, -1, 9)], ids=["definite", "indefinite"])
def test_one_large_eigenvalue_does_not_end_the_run_in_float32(low):
    # √ε ‖A‖ is larger than all other eigenvalues; half the digits are lost to the large one.
    values = np.r_[low, np.linspace(1, 2, 10), 1e4]
    A = symmetric(values)
    b = np.random.default_rng(3).standard_normal(len(values))
    result = solve(A.astype(np.float32), b.astype(np.float32), 10)
    norm = np.linalg.norm(b)
    exact = np.linalg.norm(b - A @ scipy_iterates(A, b, 10)[-1]) / norm
    found = np.linalg.norm(b - A @ np.asarray(result.solution, np.float64)) / norm
    assert found < max(4 * exact, 1e-2)


def test_an_inconsistent_system_with_one_large_eigenvalue_ends_in_float32():
    A = symmetric(np.r_[np.zeros(10), np.linspace(1, 2, 9), 1e4])
    b = np.random.default_rng(0).standard_normal(20)
    best = np.linalg.norm(b - A @ np.linalg.lstsq(A, b, rcond=1e-10)[0])
    result = solve(A.astype(np.float32), b.astype(np.float32), 20)
    assert np.linalg.norm(b - A @ np.asarray(result.solution, np.float64)) < 1.05 * best
    assert float(jnp.linalg.norm(result.solution)) < 1e2


@pytest.mark.parametrize("condition", [1e4, 1e8])
def test_float32_stays_stable_on_ill_conditioned_systems(condition):
    A = symmetric(np.geomspace(1 / condition, 1.0, 40))
    b = np.random.default_rng(1).standard_normal(40)
    result = solve(A.astype(np.float32), b.astype(np.float32), 30)
    assert np.all(np.isfinite(result.solution))
    true_residual = np.linalg.norm(b - A @ np.asarray(result.solution, np.float64))
    assert true_residual <= float(result.residual_norms[0])
    np.testing.assert_allclose(result.residual_norms[-1], true_residual, rtol=0.2, atol=1e-3)


def test_bfloat16_systems_are_solved_to_their_precision():
    A = jnp.asarray(symmetric(np.linspace(1, 10, 8)), jnp.bfloat16)
    b = jnp.asarray(RHS[:8], jnp.bfloat16)
    result = solve(A, b, 6)
    assert result.solution.dtype == jnp.bfloat16
    assert result.residual_norms.dtype == jnp.float32
    exact = np.linalg.solve(np.asarray(A, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(
        np.asarray(result.solution, np.float64), exact, atol=0.05 * np.abs(exact).max()
    )


@pytest.mark.parametrize("shift", [0.0, -2.0, 0.8], ids=["later", "at once", "late"])
def test_nonpositive_curvature_is_reported_and_the_trusted_iterate_descends(shift):
    A = (INDEFINITE + shift * np.eye(10)).astype(np.float32)
    b = RHS.astype(np.float32)
    results = [solve(A, b, k) for k in range(1, 8)]
    residuals = [b] + [np.asarray(result.residual, np.float64) for result in results]
    first = next(k for k, r in enumerate(residuals) if r @ A.astype(np.float64) @ r <= 0)
    expected = results[first - 1].solution if first else -results[0].solution
    for k, result in enumerate(results, start=1):
        assert bool(result.nonpositive_curvature) == (k > first)
        assert float(result.trusted @ b) >= 0
        np.testing.assert_allclose(
            result.trusted, expected if k > first else result.solution, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_products_that_are_not_finite_leave_the_last_iterate(bad):
    A = symmetric(np.linspace(1, 5, 6)).astype(np.float32)
    b = RHS[:6].astype(np.float32)
    calls = []

    def matvec(v):
        calls.append(1)
        return A @ v * (bad if len(calls) == 3 else 1.0)

    result = minres(matvec, jnp.asarray(b), num_steps=5)
    assert bool(result.failed)
    assert int(result.num_steps) == 2
    np.testing.assert_allclose(result.solution, solve(A, b, 2).solution, rtol=1e-6)
    broken = solve(A, b * np.float32(bad), 3)
    assert bool(broken.failed)
    assert not np.any(broken.solution)


def test_indefinite_preconditioner_is_a_failure_not_a_nan():
    A = symmetric(np.linspace(1, 5, 6)).astype(np.float32)
    result = solve(A, RHS[:6].astype(np.float32), 4, preconditioner=lambda r: -r)
    assert bool(result.failed)
    assert not np.any(result.solution)
