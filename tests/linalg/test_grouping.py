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
