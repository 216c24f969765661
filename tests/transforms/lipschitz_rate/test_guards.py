"""The guards of the Lipschitz rate, and what is not finite."""

import jax.numpy as jnp
import numpy as np

import optalr
from tests.transforms.lipschitz_rate.problems import feed, moments


def test_guards_bound_the_rate_and_are_counted():
    tx = optalr.scale_by_lipschitz_rate(
        "sigmoid", guards={"min_rate": 0.1, "max_rate": 10.0, "warmup_steps": 1}
    )
    rates, state = feed(tx, [4.0, 1e-6, 1e6, 4.0])
    np.testing.assert_allclose(rates, [0.1, 10.0, 0.1, 4.0], rtol=1e-6)
    assert int(optalr.metrics(state)["guarded_rates"]) == 3
    plain, _ = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0])
    np.testing.assert_allclose(plain, 4.0)


def test_once_the_loss_has_risen_no_step_is_longer_than_one():
    w = jnp.full((6, 2), 3.0)
    length = float(jnp.linalg.norm(w))

    def rates(values, **guards):
        tx = optalr.scale_by_lipschitz_rate("sigmoid", guards=guards)
        state, found = tx.init(w), []
        for value in values:
            updates, state = tx.update(w, state, w, head=moments(4.0), value=value)
            found.append(float(state.learning_rate))
            np.testing.assert_allclose(updates, -found[-1] * w, rtol=1e-6)
        return found, int(state.guarded_rates)

    # 1/L = 4 as long as the loss stays below 1.5 times the first, then 1/|g| for good.
    found, count = rates([2.0, 2.9, 3.1, 0.5])
    np.testing.assert_allclose(found, [4.0, 4.0, 1 / length, 1 / length], rtol=1e-6)
    assert count == 2
    np.testing.assert_allclose(rates([2.0, np.nan])[0], [4.0, 1 / length], rtol=1e-6)
    np.testing.assert_allclose(rates([2.0], max_rise=0.0, max_step=3.0)[0], [3 / length], rtol=1e-6)
    # A short step is not touched.
    np.testing.assert_allclose(rates([2.0, 9.0], max_step=100.0)[0], 4.0)
    # Switched off, or where the loss is not known, it is the paper's rule.
    assert rates([2.0, 9.0], max_step=False) == ([4.0, 4.0], 0)
    plain, _ = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0, 4.0])
    np.testing.assert_allclose(plain, 4.0)
    paper = optalr.scale_by_lipschitz_rate("sigmoid", guards="off")
    rates, state = feed(paper, [1e-6, 1e9], value=1.0)
    np.testing.assert_allclose(rates, [16e6, 16e-9], rtol=1e-5)
    assert int(state.guarded_rates) == 0


def test_zero_and_infinite_activations_leave_the_last_rate_in_place():
    rates, state = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [4.0, 0.0, np.inf, np.nan])
    np.testing.assert_allclose(rates, 4.0)
    assert int(state.failures) == 3
    rates, state = feed(optalr.scale_by_lipschitz_rate("sigmoid"), [0.0])
    np.testing.assert_allclose(rates, 0.01)  # nothing measured yet: the warm-up rate


def test_a_direction_that_is_not_finite_gives_a_zero_update():
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    w = jnp.ones((6, 2))
    updates, state = tx.update(w * jnp.nan, tx.init(w), w, head=moments(4.0))
    np.testing.assert_array_equal(updates, jnp.zeros_like(w))
    assert int(state.failures) == 1
