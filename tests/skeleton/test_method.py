"""What the tests of a method show: by hand, by a plain loop, exact cases, properties, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.skeleton import method as optalr


def updates_of(gradients, **settings):
    """Return all updates, stacked, and the last state."""
    tx = optalr.scale_by_skeleton(**settings)
    state = tx.init(jnp.zeros_like(gradients[0]))
    step, history = jax.jit(tx.update), []
    for gradient in gradients:
        update, state = step(gradient, state)
        history.append(np.asarray(update))
    return np.array(history), state


def test_by_hand_on_2_by_2():
    gradients = jnp.array([[[3.0, 4.0], [0.0, -2.0]], [[3.0, 0.0], [1.0, -2.0]]])
    updates, state = updates_of(gradients, decay=0.5, damping=1.0)
    # v/weight after the first: 9, 16, 0, 4; after the second (0.25 g₁² + 0.5 g₂²)/0.75.
    first = [[3 / 10**0.5, 4 / 17**0.5], [0, -2 / 5**0.5]]
    second = [[3 / 10**0.5, 0], [1 / (2 / 3 + 1) ** 0.5, -2 / 5**0.5]]
    np.testing.assert_allclose(updates, [first, second], rtol=1e-6)
    assert float(state.damping) == 1.0


def test_a_plain_float64_loop_agrees():
    gradients = np.random.default_rng(0).normal(size=(20, 6))
    average, expected = np.zeros(6), []
    for t, g in enumerate(gradients, start=1):
        average = 0.9 * average + 0.1 * g**2
        expected.append(g / np.sqrt(average / (1 - 0.9**t) + 1e-3))
    updates, _ = updates_of(jnp.asarray(gradients, jnp.float32), decay=0.9, damping=1e-3)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_constant_gradients_become_signs():
    # A case where the method is exact: the mean square of a constant is its square.
    gradients = jnp.broadcast_to(jnp.array([2.0, -0.5, 1e3]), (5, 3))
    updates, _ = updates_of(gradients, damping=1e-12)
    np.testing.assert_allclose(updates, np.sign(gradients), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_unit_of_the_gradient_does_not_matter(scale):
    # A property: u(c·g) with damping c²·λ is u(g).
    gradients = jax.random.normal(jax.random.key(1), (6, 4))
    plain, _ = updates_of(gradients, damping=1e-2)
    scaled, _ = updates_of(scale * gradients, damping=scale**2 * 1e-2)
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


def test_zero_gradients_give_zero_updates():
    # A hard case: nothing to divide by.
    updates, state = updates_of(jnp.zeros((3, 2)))
    assert not np.any(updates)
    assert int(state.failures) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_bad_gradient_is_counted_and_leaves_the_average(bad):
    good = jnp.array([1.0, 2.0])
    updates, state = updates_of([good, jnp.array([bad, 1.0]), good], damping=1e-12)
    assert not np.any(updates[1])
    np.testing.assert_allclose(updates[2], [1, 1], rtol=1e-6)
    assert int(state.failures) == 1


@pytest.mark.parametrize(("argument", "value"), [("decay", 1.0), ("damping", 0.0)])
def test_arguments_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=argument):
        optalr.scale_by_skeleton(**{argument: value})
