"""The W2 acceleration against the scheme written out."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optalr.transforms.nesterov_flow import accelerate_by_nesterov_flow


@pytest.mark.parametrize("friction", [3.0, 5.0])
def test_equals_the_scheme_of_su_boyd_and_candes(friction):
    A, rates = np.array([1.0, 10.0]), [0.05, 0.05, 0.05, 0.01, 0.01, 0.01]
    tx = optax.chain(
        optax.scale_by_learning_rate(lambda i: jnp.asarray(rates)[i]),
        accelerate_by_nesterov_flow(friction),
    )
    params = jnp.ones(2)
    state = tx.init(params)
    w_old = y = np.ones(2)
    for k, rate in enumerate(rates, start=1):
        updates, state = tx.update(jnp.asarray(A) * params, state, params)
        params = optax.apply_updates(params, updates)
        w = y - rate * A * y
        y = w + (k - 1) / (k + friction - 1) * (w - w_old)
        w_old = w
        np.testing.assert_allclose(params, y, rtol=1e-5)


def test_non_finite_updates_are_dropped_and_counted():
    tx = accelerate_by_nesterov_flow()
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.ones(2), state)
    updates, after = tx.update(jnp.array([1.0, jnp.nan]), state)
    assert not np.any(updates)
    assert int(after.failures) == 1
    np.testing.assert_array_equal(after.velocity, state.velocity)


def test_the_scheme_goes_on_as_if_a_dropped_update_had_not_arrived():
    tx = accelerate_by_nesterov_flow()

    def end(updates):
        w = jnp.zeros(1)
        state = tx.init(w)
        for update in updates:
            moved, state = tx.update(jnp.full(1, update), state, w)
            w = optax.apply_updates(w, moved)
        return w, state

    (w, state), (expected, clean) = end([1.0, 1.0, jnp.nan, 1.0]), end([1.0, 1.0, 1.0])
    np.testing.assert_array_equal(w, expected)
    assert int(state.count) == int(clean.count) == 3


def test_bad_friction_is_named():
    with pytest.raises(ValueError, match="friction"):
        accelerate_by_nesterov_flow(0.0)
