"""Arguments of the loss may be given by name, and mean the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr

X, Y = jax.random.normal(jax.random.key(0), (4, 3)), jnp.ones((4, 2))
W = jnp.ones((3, 2))


def loss_fn(w, x, y, *, scale=1.0):
    return scale * jnp.mean((x @ w - y) ** 2)


evaluate = optalr.value_grad_and_extras(loss_fn)


def test_named_arguments_mean_the_same():
    by_place, by_name = evaluate(W, X, Y), evaluate(W, x=X, y=Y)
    for part in ("value", "grad", "signals"):
        jax.tree.map(np.testing.assert_array_equal, by_place[2][part], by_name[2][part])
    np.testing.assert_array_equal(by_place[2]["value_fn"](2 * W), by_name[2]["value_fn"](2 * W))


def test_an_argument_that_has_no_place_reaches_the_loss():
    value, grads, extras = evaluate(W, X, y=Y, scale=3.0, signals=False)
    np.testing.assert_allclose(value, loss_fn(W, X, Y, scale=3.0))
    np.testing.assert_allclose(grads, jax.grad(loss_fn)(W, X, Y, scale=3.0), rtol=1e-6)
    np.testing.assert_allclose(extras["value_fn"](W), value)


def test_a_batch_by_name_is_data_of_a_compiled_step():
    traces = []

    @jax.jit
    def probe(extras):
        traces.append(1)
        return extras["value_fn"](W)

    for shift in range(3):
        value, _, extras = evaluate(W, X, y=Y + shift, signals=False)
        np.testing.assert_allclose(probe(extras), value, rtol=1e-6)
    assert len(traces) == 1


def test_a_name_that_the_loss_does_not_know_is_an_error():
    with pytest.raises(TypeError, match="weather"):
        evaluate(W, X, Y, weather=1)
