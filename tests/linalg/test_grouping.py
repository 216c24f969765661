import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.linalg import inverse_roots
from tests.references import dense_inverse_root, random_spd


def matrices():
    return [
        random_spd(0, 8),
        random_spd(1, 6),
        np.stack([random_spd(2, 8), random_spd(3, 8)]),
        random_spd(4, 7, scale=1e20),
    ]


@pytest.mark.parametrize("padding", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("method", ["eigh", "cholesky_polar"])
def test_each_in_its_place_whatever_the_grouping(padding, method):
    damping = [0.1, 0.2, np.array([0.3, 0.4]), 1e18]
    results = inverse_roots(matrices(), damping=damping, method=method, padding=padding)
    for matrix, lam, result in zip(matrices(), damping, results, strict=True):
        expected = dense_inverse_root(matrix, 2, lam)
        assert result.root.shape == matrix.shape
        assert result.residual.shape == matrix.shape[:-2]
        np.testing.assert_allclose(result.root, expected, atol=1e-5 * np.abs(expected).max())
        assert result.success.all()
        assert (result.residual < 1e-4).all()


def test_equal_sizes_are_one_call():
    group = [jnp.asarray(random_spd(i, 5)) for i in range(4)]
    one = str(jax.make_jaxpr(lambda m: inverse_roots([m], method="eigh"))(group[0]))
    four = str(jax.make_jaxpr(lambda *m: inverse_roots(m, method="eigh"))(*group))
    assert four.count("= eigh[") == one.count("= eigh[") > 0
    padded = jax.make_jaxpr(lambda *m: inverse_roots(m, method="eigh", padding=0.25))
    assert str(padded(jnp.eye(5), jnp.eye(4))).count("= eigh[") == one.count("= eigh[")


def spectra():
    """Matrices of three sizes that need few steps, many, and none that helps."""
    easy, hard = random_spd(0, 20), np.diag(np.geomspace(1, 1e-5, 30).astype(np.float32))
    indefinite = np.diag(np.linspace(-0.5, 1, 12).astype(np.float32))
    return [easy, np.stack([hard, np.eye(30, dtype=np.float32)]), indefinite]


@pytest.mark.parametrize("method", ["coupled_newton", "cholesky_polar"])
def test_one_loop_serves_all_sizes_as_each_alone(method):
    together = inverse_roots(spectra(), method=method)
    for matrix, found in zip(spectra(), together, strict=True):
        [alone] = inverse_roots([matrix], method=method)
        np.testing.assert_allclose(found.root, alone.root, rtol=2e-5, atol=1e-6)
        assert found.num_steps.tolist() == alone.num_steps.tolist()
        assert found.fell_back.tolist() == alone.fell_back.tolist()
    assert together[2].fell_back
    assert not together[0].fell_back
    jaxpr = str(jax.make_jaxpr(lambda *m: inverse_roots(m, method=method))(*spectra()))
    alone = str(jax.make_jaxpr(lambda m: inverse_roots([m], method=method))(spectra()[0]))
    assert jaxpr.count("while[") == alone.count("while[")


@pytest.mark.parametrize("method", ["auto", "coupled_newton"])
def test_several_sizes_under_vmap(method):
    lanes = [jnp.stack([jnp.asarray(m), 2 * jnp.asarray(m)]) for m in spectra()[:2]]
    damping = jnp.array([0.1, 0.3])

    def roots(damping, *matrices):
        return [each.root for each in inverse_roots(matrices, damping=damping, method=method)]

    mapped = jax.vmap(roots)(damping, *lanes)
    for lane in range(2):
        alone = roots(damping[lane], *(each[lane] for each in lanes))
        for one, other in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(one[lane], other, rtol=2e-5, atol=1e-6)


def test_a_bad_matrix_does_not_spoil_its_group():
    good, bad = random_spd(0, 5), np.full((4, 4), np.nan, np.float32)
    results = inverse_roots([good, bad], padding=0.5)
    assert results[0].success
    assert not results[1].success
    assert np.isinf(results[1].residual)


def test_errors_and_the_empty_list():
    assert inverse_roots([]) == []
    with pytest.raises(ValueError, match="damping"):
        inverse_roots([np.eye(2)], damping=[0.1, 0.2])
    with pytest.raises(ValueError, match="padding"):
        inverse_roots([np.eye(2)], padding=-1.0)
    with pytest.raises(ValueError, match=r"matrices\[1\]"):
        inverse_roots([np.eye(2), np.zeros((2, 3))])
    with pytest.raises(ValueError, match="method"):
        inverse_roots([np.eye(2)], method="eigenbasis")
