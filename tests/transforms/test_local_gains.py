import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr


def gains_after(gradients, **settings):
    tx = optalr.scale_by_local_gains(**settings)
    state = tx.init(jnp.zeros_like(gradients[0]))
    history = []
    for g in gradients:
        updates, state = jax.jit(tx.update)(g, state)
        np.testing.assert_allclose(updates, state.gains * g, rtol=1e-6)
        history.append(np.asarray(state.gains))
    return np.array(history), state


def test_by_hand_on_two_weights():
    gradients = jnp.array([[1.0, 1.0], [2.0, -1.0], [3.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    gains, _ = gains_after(gradients, beta=0.2)
    np.testing.assert_allclose(gains[:, 0], [1, 1.2, 1.4, 1.4, 1.4], rtol=1e-6)
    np.testing.assert_allclose(gains[:, 1], [1, 0.8, 0.64, 0.84, 1.04], rtol=1e-6)


def test_a_plain_loop_agrees():
    rng = np.random.default_rng(0)
    gradients = np.round(rng.normal(size=(30, 8)), 0)  # many zeros
    gain, previous, expected = np.ones(8), np.zeros(8), []
    for g in gradients:
        gain = np.where(g * previous > 0, gain + 0.3, np.where(g * previous < 0, gain * 0.7, gain))
        gain, previous = np.clip(gain, 0.2, 2.0), g
        expected.append(gain)
    gains, _ = gains_after(
        jnp.asarray(gradients, jnp.float32), beta=0.3, min_gain=0.2, max_gain=2.0
    )
    np.testing.assert_allclose(gains, expected, rtol=1e-5)
    assert gains.min() == np.float32(0.2)
    assert gains.max() == 2.0


def test_tiny_gradients_keep_their_signs():
    # The product of two such gradients underflows; their signs do not.
    gains, _ = gains_after(jnp.full((3, 1), 1e-30), beta=0.5)
    np.testing.assert_allclose(gains[:, 0], [1, 1.5, 2])


def test_bad_gradients_leave_the_gains():
    tx = optalr.scale_by_local_gains(0.5)
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.ones(2), state)
    updates, after = tx.update(jnp.array([jnp.nan, 1.0]), state)
    assert not np.any(updates)
    np.testing.assert_array_equal(after.gains, state.gains)
    np.testing.assert_array_equal(after.signs, state.signs)
    assert int(after.failures) == 1


def test_it_turns_a_narrow_valley_into_a_wider_one():
    scales = jnp.array([1.0, 0.01])

    def distance(gains):
        tx = optalr.scale_by_local_gains(0.1) if gains else optalr.scale_by_local_gains(0.0)
        params = jnp.ones(2)
        state = tx.init(params)
        for _ in range(60):
            updates, state = tx.update(scales * params, state)
            params = params - 0.5 * updates
        return float(jnp.linalg.norm(params))

    assert distance(True) < 0.5 * distance(False)


def test_arguments_are_refused_at_construction():
    for name, value in {"beta": 1.0, "min_gain": 2.0, "max_gain": 0.5}.items():
        with pytest.raises(ValueError, match=name):
            optalr.scale_by_local_gains(**{name: value})
