import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr import linalg
from tests.references import column_stack, dense_kronecker_power, random_spd

M, N = 4, 3


@pytest.fixture
def factors():
    return random_spd(0, M, condition=20.0), random_spd(1, N, condition=10.0, scale=3.0)


@pytest.fixture
def gradient():
    return np.random.default_rng(2).standard_normal((M, N)).astype(np.float32)


def test_factor_roots_equal_the_dense_power(factors, gradient):
    left, right = factors
    roots = [linalg.inverse_root(factor).root for factor in factors]
    ours = linalg.apply_kronecker(jnp.asarray(gradient), *roots)
    dense = dense_kronecker_power(left, right, -0.5) @ column_stack(gradient)
    np.testing.assert_allclose(column_stack(ours), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.3, 0.0, 0.5])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_eigenbasis_power_damps_the_product_exactly(factors, gradient, power, damping):
    bases = [linalg.eigenbasis(factor) for factor in factors]
    power_function = jax.jit(linalg.apply_eigenbasis_power)
    ours = power_function(gradient, *bases, power, damping)
    dense = dense_kronecker_power(*factors, power, damping) @ column_stack(gradient)
    np.testing.assert_allclose(column_stack(ours), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_may_be_left_out(factors, gradient, side):
    full = [linalg.eigenbasis(factor) for factor in factors]
    kept = 0 if side == "left" else 1
    bases, dense_factors = [None, None], [np.eye(M), np.eye(N)]
    bases[kept], dense_factors[kept] = full[kept], factors[kept]
    ours = linalg.apply_eigenbasis_power(jnp.asarray(gradient), *bases, -0.5, 0.1)
    dense = dense_kronecker_power(*dense_factors, -0.5, 0.1) @ column_stack(gradient)
    np.testing.assert_allclose(column_stack(ours), dense, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="left and right"):
        linalg.apply_eigenbasis_power(jnp.asarray(gradient), None, None, -0.5)


def test_a_stack_equals_its_members(gradient):
    lefts = np.stack([random_spd(i, M) for i in range(2)])
    rights = np.stack([random_spd(i + 5, N) for i in range(2)])
    gradients = jnp.stack([gradient, 2 * gradient])
    damping = jnp.array([0.1, 0.2])
    stacked = linalg.apply_eigenbasis_power(
        gradients, linalg.eigenbasis(lefts), linalg.eigenbasis(rights), -0.5, damping
    )
    for i in range(2):
        alone = linalg.apply_eigenbasis_power(
            gradients[i],
            linalg.eigenbasis(lefts[i]),
            linalg.eigenbasis(rights[i]),
            -0.5,
            damping[i],
        )
        np.testing.assert_allclose(stacked[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18])
def test_tiny_and_huge_factors(factors, gradient, scale):
    bases = [linalg.eigenbasis(factor * np.float32(scale)) for factor in factors]
    ours = linalg.apply_eigenbasis_power(jnp.asarray(gradient), *bases, -0.5)
    dense = dense_kronecker_power(*factors, -0.5) @ column_stack(gradient) / scale
    np.testing.assert_allclose(column_stack(ours), dense, rtol=1e-3)


def test_zero_factors_give_zeros_and_damping_alone_scales(gradient):
    zero = linalg.eigenbasis(jnp.zeros((M, M))), linalg.eigenbasis(jnp.zeros((N, N)))
    undamped = linalg.apply_eigenbasis_power(jnp.asarray(gradient), *zero, -0.5)
    np.testing.assert_array_equal(undamped, np.zeros((M, N)))
    damped = linalg.apply_eigenbasis_power(jnp.asarray(gradient), *zero, -0.5, 4.0)
    np.testing.assert_allclose(damped, gradient / 2, rtol=1e-6)


def test_lemma_1_the_preconditioned_norm(factors, gradient):
    # ‖F^{-1/2} u‖_F = ‖u‖₂ for the damped F in use.
    bases = [linalg.eigenbasis(factor) for factor in factors]
    update = linalg.apply_eigenbasis_power(jnp.asarray(gradient), *bases, -0.5, 0.1)
    fisher = dense_kronecker_power(*factors, 1.0, 0.1)
    norm = column_stack(update) @ fisher @ column_stack(update)
    np.testing.assert_allclose(norm, np.sum(gradient**2), rtol=1e-4)


def test_eigenbasis_reports_what_is_not_finite():
    stack = np.stack([random_spd(0, M), random_spd(1, M)])
    stack[0, 0, 0] = np.nan
    for basis in (
        linalg.eigenbasis(stack),
        linalg.refresh_eigenbasis(stack, jnp.broadcast_to(jnp.eye(M), stack.shape)),
    ):
        assert np.isinf(basis.residual[0])
        assert np.isfinite(basis.residual[1])
        np.testing.assert_array_equal(basis.vectors[0], np.eye(M))
        assert np.isfinite(basis.vectors).all()
        assert np.isfinite(basis.values).all()


def test_refresh_converges_to_the_eigenbasis():
    matrix = random_spd(3, 6, condition=1e3)
    basis = linalg.EigenBasis(jnp.eye(6), jnp.ones(6), jnp.array(np.inf))
    residuals = []
    for _ in range(12):
        basis = linalg.refresh_eigenbasis(matrix, basis.vectors)
        residuals.append(float(basis.residual))
    assert residuals[-1] < 1e-5
    assert residuals[-1] < residuals[0]
    np.testing.assert_allclose(
        np.sort(basis.values), np.linalg.eigvalsh(matrix.astype(float)), rtol=1e-2, atol=1e-6
    )
    exact = linalg.refresh_eigenbasis(matrix, linalg.eigenbasis(matrix).vectors)
    assert exact.residual < 1e-5


def test_refresh_of_a_singular_matrix_stays_orthonormal():
    matrix = random_spd(0, 8, spectrum="low_rank")
    vectors = linalg.refresh_eigenbasis(matrix, jnp.eye(8)).vectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-5)
    zero = linalg.refresh_eigenbasis(jnp.zeros((3, 3)), jnp.eye(3))
    np.testing.assert_allclose(zero.vectors.T @ zero.vectors, np.eye(3), atol=1e-6)
    np.testing.assert_array_equal(zero.values, np.zeros(3))
    assert zero.residual == 0


def test_split_damping_balances_and_multiplies_to_the_whole(factors):
    left, right = linalg.split_damping(*factors, 0.01)
    np.testing.assert_allclose(left * right, 0.01, rtol=1e-6)
    means = [np.trace(factor) / len(factor) for factor in factors]
    np.testing.assert_allclose(left / right, means[0] / means[1], rtol=1e-5)
    zero = linalg.split_damping(jnp.zeros((2, 2)), jnp.eye(2), 0.01)
    np.testing.assert_allclose(zero, (0.1, 0.1), rtol=1e-6)


def test_second_moments_survive_a_permutation_and_keep_their_sum(factors):
    rng = np.random.default_rng(0)
    second = jnp.asarray(rng.random((M, N)), jnp.float32)
    old = tuple(linalg.eigenbasis(factor).vectors for factor in factors)
    order = np.array([2, 0, 3, 1])
    flipped = jnp.asarray(np.asarray(old[0])[:, order] * np.array([1, -1, 1, -1], np.float32))
    carried = linalg.carry_second_moments(second, old, (flipped, old[1]))
    np.testing.assert_allclose(carried, np.asarray(second)[order], rtol=1e-5, atol=1e-6)
    rotated = jnp.linalg.qr(jnp.asarray(rng.standard_normal((N, N)), jnp.float32))[0]
    moved = linalg.carry_second_moments(second, old, (old[0], rotated))
    np.testing.assert_allclose(moved.sum(), second.sum(), rtol=1e-5)
    assert (moved >= 0).all()


def test_second_moments_of_a_diagonal_covariance_are_exact(factors):
    # E[(Q'ᵀ G P')²] by its definition, for G = Q Z Pᵀ with independent Z of variance v.
    rng = np.random.default_rng(4)
    variance = rng.random((M, N))
    old = [np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (M, N)]
    new = [np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (M, N)]
    turns = [q.T @ p for q, p in zip(new, old, strict=True)]
    dense = np.kron(turns[1], turns[0])
    expected = np.diag(dense @ np.diag(column_stack(variance)) @ dense.T)
    as_jax = [tuple(jnp.asarray(q, jnp.float32) for q in pair) for pair in (old, new)]
    ours = linalg.carry_second_moments(jnp.asarray(variance, jnp.float32), *as_jax)
    np.testing.assert_allclose(column_stack(ours), expected, rtol=1e-4)


def test_first_moments_are_carried_exactly(factors, gradient):
    old = tuple(linalg.eigenbasis(factor).vectors for factor in factors)
    new = tuple(
        linalg.refresh_eigenbasis(factor, jnp.eye(len(factor))).vectors for factor in factors
    )
    held = linalg.to_eigenbasis(jnp.asarray(gradient), *old)
    carried = linalg.carry_first_moments(held, old, new)
    np.testing.assert_allclose(linalg.from_eigenbasis(carried, *new), gradient, atol=1e-5)
    with pytest.raises(ValueError, match="old and new"):
        linalg.carry_first_moments(held, old, (None, new[1]))
