import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import inverse_root
from optalr.linalg.roots.methods import METHODS
from tests.references import dense_inverse_root, dense_root_residual, random_spd


def test_two_by_two_by_hand():
    # A = [[2, 1], [1, 2]] has eigenvalues 3 and 1, so A^{-1/2} = ½[[1/√3+1, 1/√3−1], ...].
    result = inverse_root(jnp.array([[2.0, 1.0], [1.0, 2.0]]))
    s = 1 / np.sqrt(3)
    expected = 0.5 * np.array([[s + 1, s - 1], [s - 1, s + 1]])
    np.testing.assert_allclose(result.root, expected, atol=1e-6)
    assert result.residual < 1e-6
    assert result.success
    assert not result.fell_back


@pytest.mark.parametrize("p", [1, 2, 3, 4, 2.5, 0.5])
def test_agrees_with_float64(p):
    matrix = random_spd(0, 20, condition=50.0)
    result = inverse_root(matrix, p, damping=1e-2)
    expected = dense_inverse_root(matrix, p, 1e-2)
    np.testing.assert_allclose(result.root, expected, atol=2e-4 * np.abs(expected).max())
    assert result.residual < 1e-4


def test_leading_dimensions_and_damping_per_matrix():
    stack = np.stack([random_spd(i, 6) for i in range(6)]).reshape(2, 3, 6, 6)
    damping = np.linspace(0.01, 0.1, 6, dtype=np.float32).reshape(2, 3)
    result = inverse_root(stack, 2, damping=damping)
    assert result.root.shape == (2, 3, 6, 6)
    assert result.residual.shape == result.success.shape == (2, 3)
    np.testing.assert_allclose(result.root, dense_inverse_root(stack, 2, damping), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_scale_invariance(scale):
    matrix = random_spd(0, 16, condition=1e3)
    plain = inverse_root(matrix)
    scaled = inverse_root(matrix * np.float32(scale))
    np.testing.assert_allclose(
        np.asarray(scaled.root) * np.sqrt(scale), plain.root, rtol=1e-3, atol=1e-3
    )
    assert scaled.success


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_is_reported_and_contained(bad):
    stack = np.stack([random_spd(0, 5), random_spd(1, 5)])
    stack[0, 1, 2] = bad
    result = inverse_root(stack)
    assert np.isinf(result.residual[0])
    assert not result.success[0]
    assert np.isfinite(result.root).all()
    np.testing.assert_allclose(result.root[1], dense_inverse_root(stack[1]), atol=1e-3)


def test_zero_and_singular():
    zero = inverse_root(jnp.zeros((3, 3)))
    assert not zero.success
    assert np.isfinite(zero.root).all()
    damped = inverse_root(jnp.zeros((3, 3)), damping=4.0)
    np.testing.assert_allclose(damped.root, 0.5 * np.eye(3), atol=1e-7)
    singular = inverse_root(random_spd(0, 16, spectrum="low_rank"))
    assert np.isfinite(singular.root).all()


def test_traced_power_and_float64(x64):
    matrix = jnp.asarray(random_spd(0, 12, condition=1e6, dtype=np.float64))
    result = jax.jit(inverse_root)(matrix, 3.0)
    assert result.root.dtype == jnp.float64
    np.testing.assert_allclose(result.root, dense_inverse_root(matrix, 3.0), rtol=1e-8, atol=1e-8)
    assert dense_root_residual(matrix, inverse_root(matrix).root) < 1e-8


def test_half_precision_is_answered_in_float32():
    result = inverse_root(jnp.eye(3, dtype=jnp.bfloat16))
    assert result.root.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"matrix": np.zeros((2, 3))}, "matrix"),
        ({"matrix": np.eye(2), "p": 0}, "p must"),
        ({"matrix": np.eye(2), "damping": -1.0}, "damping"),
        ({"matrix": np.eye(2), "damping": np.ones(3)}, "damping"),
        ({"matrix": np.eye(2), "method": "magic"}, "method"),
        ({"matrix": np.eye(2) * 1j}, "matrix"),
    ],
)
def test_errors_name_the_argument(arguments, match):
    with pytest.raises((ValueError, TypeError), match=match):
        inverse_root(**arguments)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_narrow_matrices_stay_narrow_where_float64_is_on(x64, dtype, method):
    matrix = 4 * jnp.eye(40, dtype=dtype)
    found = inverse_root(matrix, 2, method=method)
    assert {found.root.dtype, found.residual.dtype} == {jnp.dtype("float32")}
    np.testing.assert_allclose(found.root, 0.5 * np.eye(40), atol=1e-5)
