"""The window of the last gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr import scale_by_full_matrix
from tests.transforms.dense.problems import power_of, sequence, trajectory


@pytest.mark.parametrize("power", [-0.5, -1.0, 0.0])
@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("length", [2, 4, 7])
def test_a_window_is_the_matrix_of_the_last_gradients(power, decay, length):
    grads = sequence((3, 3), length)
    tx = scale_by_full_matrix(power, decay=decay, damping=1e-2, damping_form="absolute", window=4)
    updates, _ = trajectory(tx, grads)
    last = [np.asarray(g, np.float64).reshape(-1) for g in grads[-4:]]
    weights = np.ones(len(last))
    if decay is not None:
        weights = decay ** np.arange(len(last))[::-1]
        weights = weights / weights.sum()
    f = sum(w * np.outer(v, v) for w, v in zip(weights, last, strict=True)) + 1e-2 * np.eye(9)
    np.testing.assert_allclose(
        updates[-1].reshape(-1), power_of(f, power) @ last[-1], rtol=2e-3, atol=1e-4
    )


def test_a_window_longer_than_the_run_is_the_whole_matrix():
    grads = sequence((5,), 6)
    arguments = {"damping": 1e-3, "damping_form": "absolute", "decay": None}
    windowed, _ = trajectory(scale_by_full_matrix(window=10, **arguments), grads)
    whole, _ = trajectory(scale_by_full_matrix(**arguments), grads)
    np.testing.assert_allclose(windowed[-1], whole[-1], rtol=1e-3, atol=1e-4)


def test_a_window_takes_a_vector_that_no_matrix_could():
    tx = scale_by_full_matrix(window=2)
    shapes = jax.eval_shape(tx.init, jnp.zeros(10**6))
    assert optalr.state_bytes(shapes) < 2.1 * 4 * 10**6
    (updates,), _ = trajectory(tx, [jnp.ones(10**5)])
    assert bool(jnp.isfinite(updates).all())


@pytest.mark.parametrize("window", [None, 3])
def test_without_damping_repeated_gradients_do_no_harm(window):
    g = sequence((4,), 1)[0]
    tx = scale_by_full_matrix(decay=None, damping=0.0, window=window)
    updates, state = trajectory(tx, [g, g, g])
    np.testing.assert_allclose(updates[-1], g / jnp.linalg.norm(g) / np.sqrt(3), rtol=1e-2)
    assert int(state.failures) == 0


def test_a_window_of_doubles_is_worked_on_in_doubles():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((3, 6))
    with jax.enable_x64(True):
        tx = scale_by_full_matrix(decay=None, damping=1e-8, damping_form="absolute", window=4)
        updates, state = trajectory(tx, list(jnp.asarray(rows)))
        assert state.gram.dtype == jnp.float64
        mixed = tx.init({"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)})
        assert mixed.gram.dtype == jnp.float64
    expected = power_of(rows.T @ rows + 1e-8 * np.eye(6), -0.5) @ rows[-1]
    # The part outside the window is amplified 1e4 times; floats err by 6e-3 here.
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-8, atol=1e-9)
