"""What is read of the Kronecker factors in a state, whatever their form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.reading.spectra import factor_spectra
from tests.reading.factors import BARE, moments


def spectra_of(rows, cols, **arguments):
    """Return what is found in a state that holds these factors of a kernel."""
    tx = optalr.scale_by_kronecker()
    state = tx.init({"w": jnp.ones((2, 2))})
    row_side, col_side = (
        side._replace(factor={"w": 0.5 * jnp.asarray(factor, jnp.float32)})
        for side, factor in zip(state.memory.sides, (rows, cols), strict=True)
    )
    memory = state.memory._replace(rows=row_side, cols=col_side)
    state = state._replace(weight=jnp.float32(0.5), memory=memory)
    return factor_spectra(state, **arguments)["['w']"]


def test_factor_spectra_tell_stacked_diagonals_from_matrices():
    # Three layers of three rows, of which only a diagonal is kept: symmetric, by chance.
    diagonals = np.outer([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    matrices = np.stack([np.diag([1.0, 4.0])] * 3)
    rows, cols = spectra_of(diagonals, matrices)
    np.testing.assert_allclose(rows, np.sort(diagonals))
    np.testing.assert_allclose(cols, [[1, 4]] * 3)
    uneven = np.arange(9.0).reshape(3, 3)
    for found in spectra_of(uneven, uneven[::-1].copy()):
        assert found.shape == (3, 3)
    np.testing.assert_allclose(spectra_of(uneven, uneven)[0], uneven)
    symmetric = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(spectra_of(symmetric, symmetric)[0], [1, 3], rtol=1e-6)


def test_factor_spectra_leave_the_padding_of_blocks_out():
    rows, cols = np.diag([1.0, 2, 3, 4, 5]), np.diag([2.0, 1.0])
    g = {"w": jnp.ones((5, 2)), "b": jnp.ones(2)}
    options = dataclasses.replace(BARE, block_size=3)
    tx = optalr.scale_by_kronecker(options=options)
    signals = {"w": moments(rows, cols, 5), "b": None}
    _, state = jax.jit(lambda g, s: tx.update(g, s, signals=signals))(g, tx.init(g))
    left, right = factor_spectra(state, g, options=options)["['w']"]
    np.testing.assert_allclose(left, [1, 2, 3, 4, 5], rtol=1e-6)
    np.testing.assert_allclose(right, [1, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="options tell of other factors"):
        factor_spectra(state, g)
    with pytest.raises(ValueError, match=r"params.* \['w'\]"):
        factor_spectra(state, {"other": g["w"]}, options=options)


def test_factor_spectra_are_those_of_the_moving_averages():
    rows, cols = np.diag([4.0, 1.0, 2.0]), np.diag([0.5, 3.0])
    g = {"w": jnp.ones((3, 2))}
    tx = optalr.tso_alra(1e-2)
    assert factor_spectra(tx.init(g)) == {}
    signals = {"w": moments(rows, cols, 5)}
    _, state = jax.jit(lambda g, s: tx.update(g, s, signals=signals))(g, tx.init(g))
    left, right = factor_spectra(state)["['w']"]
    np.testing.assert_allclose(left, [1, 2, 4], rtol=1e-5)
    np.testing.assert_allclose(right, [0.5, 3], rtol=1e-5)
