"""Every method of inverse_root over conditions, spectra, scales, dtypes; fallback; lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import inverse_root
from tests.linalg.root_methods import METHODS, every_method, relative_error
from tests.references import dense_inverse_root, dense_root_residual, random_spd

CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8]
SCALES = [1e-20, 1.0, 1e20]


def sweep(n, dtype):
    """Return a stack with every condition, spectrum and scale."""
    cases = [
        random_spd(seed, n, condition, scale, spectrum, np.float64)
        for seed, condition in enumerate(CONDITIONS)
        for spectrum in ("geometric", "clustered")
        for scale in SCALES
    ]
    # Rank-deficient, damped by 1e-3 of the largest eigenvalue.
    cases += [
        random_spd(9, n, 1, scale, "low_rank", np.float64) + 1e-3 * scale * np.eye(n)
        for scale in SCALES
    ]
    return np.stack(cases).astype(dtype)


def check_sweep(n, dtype, options):
    stack = sweep(n, dtype)
    result = inverse_root(jnp.asarray(stack), 2, **options)
    assert result.root.dtype == dtype
    assert np.isfinite(result.root).all()
    values = np.linalg.eigvalsh(stack.astype(np.float64))
    eps = np.finfo(dtype).eps
    # Rounding to float32 may have left nothing of the smallest eigenvalue, or made it negative.
    condition = values[:, -1] / np.maximum(values[:, 0], eps * values[:, -1])
    bound = np.maximum(1e-4, 8 * eps * condition)
    residual = dense_root_residual(stack, result.root)
    assert (residual <= bound).all(), (residual / bound).max()
    assert (np.abs(residual - np.asarray(result.residual)) <= 0.25 * bound).all()
    assert result.success.all()
    return result


@every_method
@pytest.mark.parametrize("n", [1, 2, 48])
def test_residual_within_its_bound_over_the_sweep(n, options):
    check_sweep(n, np.float32, options)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_auto_keeps_the_bound_over_the_sweep(n):
    check_sweep(n, np.float32, {})  # a stack of 33 × 33: here auto takes products, on a CPU


@every_method
def test_residual_within_its_bound_in_float64(x64, options):
    result = check_sweep(17, np.float64, options)
    assert not result.fell_back.any()


@pytest.mark.parametrize("n", [1, 2, 64])
def test_auto_keeps_the_bound_in_float64(x64, n):
    result = check_sweep(n, np.float64, {"method": "auto"})
    assert result.root.dtype == np.float64


@pytest.mark.slow
@every_method
def test_residual_within_its_bound_in_float64_when_large(x64, options):
    for condition in (1e2, 1e8):
        matrix = random_spd(0, 256, condition, dtype=np.float64)
        result = inverse_root(jnp.asarray(matrix), **options)
        assert dense_root_residual(matrix, result.root) <= 1e-4
        assert not result.fell_back


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eigh", "newton3", "polar"])
@pytest.mark.parametrize("n", [512, 2048])
def test_residual_within_its_bound_when_large(n, name):
    for condition in (1e2, 1e6):
        matrix = random_spd(0, n, condition)
        result = inverse_root(jnp.asarray(matrix), **METHODS[name])
        bound = max(1e-4, 8 * np.finfo(np.float32).eps * condition)
        assert dense_root_residual(matrix, result.root) <= bound
        assert not result.fell_back


@every_method
@pytest.mark.parametrize("p", [1, 4])
def test_other_roots_agree_with_float64(p, options):
    stack = np.stack([random_spd(i, 12, 30.0) for i in range(2)])
    result = inverse_root(stack, p, damping=1e-2, **options)
    expected = dense_inverse_root(stack, p, 1e-2)
    np.testing.assert_allclose(result.root, expected, atol=2e-5 * np.abs(expected).max())
    assert result.success.all()
    assert not result.fell_back.any()


@pytest.mark.parametrize("p", [1, 2, 3, 2.5])
@pytest.mark.parametrize("shape", [(8, 32), (1, 5)])
def test_auto_agrees_with_float64_whatever_it_chooses(p, shape):
    batch, n = shape
    stack = np.stack([random_spd(i, n, 30.0) for i in range(batch)])
    result = inverse_root(stack, p)
    expected = dense_inverse_root(stack, p)
    np.testing.assert_allclose(result.root, expected, atol=2e-5 * np.abs(expected).max())
    assert not result.fell_back.any()


def test_odd_roots_through_coupled_newton():
    matrix = random_spd(0, 12, 100.0)
    for order in (2, 3):
        result = inverse_root(matrix, 3, method="coupled_newton", order=order)
        expected = dense_inverse_root(matrix, 3)
        np.testing.assert_allclose(result.root, expected, atol=1e-5 * np.abs(expected).max())
        assert not result.fell_back


@pytest.mark.parametrize("name", ["newton2", "newton3", "polar"])
@pytest.mark.parametrize("n", [3, 8])
def test_no_start_vector_makes_an_iteration_stop_early(n, name):
    # Among so many small matrices some have an eigenvector that the start vector hardly holds.
    stack = [random_spd(seed, n, condition) for seed in range(40) for condition in (1e2, 1e4)]
    assert not inverse_root(np.stack(stack), **METHODS[name]).fell_back.any()


@every_method
def test_batched_equals_single(options):
    stack = np.stack([random_spd(i, 9, 10.0**i) for i in (0, 2, 5)])
    together = inverse_root(stack, **options)
    for i, matrix in enumerate(stack):
        alone = inverse_root(matrix, **options)
        scale = np.abs(alone.root).max()
        np.testing.assert_allclose(together.root[i], alone.root, atol=5e-3 * scale)
        assert together.num_steps[i] == alone.num_steps


@every_method
def test_indefinite_falls_back_once_and_is_reported(options):
    good, bad = random_spd(0, 8), random_spd(1, 8) - 0.5 * np.eye(8, dtype=np.float32)
    result = inverse_root(np.stack([good, bad]), **options)
    assert result.success.tolist() == [True, False]
    if options["method"] != "eigh":
        assert result.fell_back.tolist() == [False, True]
    assert np.isfinite(result.root).all()
    np.testing.assert_allclose(result.root[0], dense_inverse_root(good), atol=1e-4)


@every_method
def test_singular_and_non_finite_stay_finite(options):
    stack = np.stack([random_spd(0, 8, spectrum="low_rank"), np.full((8, 8), np.nan), np.eye(8)])
    result = inverse_root(stack.astype(np.float32), **options)
    assert np.isfinite(result.root).all()
    assert np.isinf(result.residual[1])
    assert not result.success[1]
    np.testing.assert_allclose(result.root[2], np.eye(8), atol=1e-6)


def test_vmap_solves_one_stack_and_keeps_the_branch():
    stack = jnp.stack([random_spd(i, 6) for i in range(3)])
    damping = jnp.array([0.1, 0.2, 0.3])

    def root(matrix, damping):
        return inverse_root(matrix, 2, damping=damping, method="cholesky_polar")

    mapped = jax.jit(jax.vmap(root))(stack, damping)
    np.testing.assert_allclose(mapped.root, root(stack, damping).root, atol=1e-6)
    shared = jax.vmap(root, in_axes=(0, None))(stack, 0.1)
    np.testing.assert_allclose(shared.root[0], mapped.root[0], atol=1e-6)
    # A vmapped cond becomes a select that runs both branches; ours must still be a conditional.
    compiled = jax.jit(jax.vmap(root)).lower(stack, damping).compile().as_text()
    assert " conditional(" in compiled


def test_a_tolerance_decides_success():
    matrix = random_spd(0, 16, 1e4)
    assert inverse_root(matrix, tolerance=1e-2).success
    strict = inverse_root(matrix, method="coupled_newton", tolerance=1e-9)
    assert not strict.success
    assert strict.residual < 1e-3


@pytest.mark.parametrize("shape", [(5, 1), (5,), (4, 4), (2, 5, 5)])
def test_a_basis_of_another_shape_is_refused(shape):
    matrices = jnp.stack([jnp.eye(5)] * 3)
    with pytest.raises(ValueError, match=r"basis.*\(3, 5, 5\)"):
        inverse_root(matrices, method="eigenbasis", basis=jnp.ones(shape))


def test_one_basis_serves_a_stack():
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 6.0))] * 3)
    result = inverse_root(matrices, method="eigenbasis", basis=jnp.eye(5))
    assert result.basis.shape == (3, 5, 5)
    assert bool(result.success.all())


def test_eigenbasis_is_refreshed_and_judged():
    first = random_spd(0, 16, 1e2)
    start = inverse_root(first, method="eigenbasis")
    assert start.success
    np.testing.assert_allclose(start.basis.T @ start.basis, np.eye(16), atol=1e-5)
    moved = 0.98 * first + 0.02 * random_spd(1, 16, 1e2)
    warm = inverse_root(moved, method="eigenbasis", basis=start.basis, tolerance=0.5)
    assert not warm.fell_back
    assert warm.residual < 0.5
    unmoved = inverse_root(first).root
    exact = dense_inverse_root(moved)
    assert relative_error(warm.root, exact) < 0.5 * relative_error(unmoved, exact)
    strict = inverse_root(moved, method="eigenbasis", basis=start.basis)
    assert strict.fell_back
    assert strict.residual < 1e-4
    np.testing.assert_allclose(strict.basis.T @ strict.basis, np.eye(16), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [*METHODS.values(), {"method": "auto"}, {"method": "eigenbasis", "basis": True}],
    ids=[*METHODS, "auto", "eigenbasis"],
)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_every_method_lowers_for_accelerators(platform, options):
    shape = jax.ShapeDtypeStruct((2, 24, 24), jnp.float32)

    def root(matrix, basis):
        chosen = dict(options, basis=basis) if "basis" in options else options
        return inverse_root(matrix, 2, damping=1e-3, **chosen)

    exported = jax.export.export(jax.jit(root), platforms=[platform])(shape, shape)
    assert exported.platforms == (platform,)


def test_errors_of_the_methods_name_the_argument():
    matrix = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match="p must be whole"):
        inverse_root(matrix, 2.5, method="coupled_newton")
    with pytest.raises(ValueError, match="p must be a power of two"):
        inverse_root(matrix, 3, method="cholesky_polar")
    with pytest.raises(TypeError, match="p must be a known number"):
        jax.jit(lambda p: inverse_root(matrix, p, method="coupled_newton"))(2)
    with pytest.raises(ValueError, match="order"):
        inverse_root(matrix, order=4)
    with pytest.raises(ValueError, match="basis"):
        inverse_root(matrix, basis=matrix)
