"""The true Fisher: moments of targets drawn from the model's own predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from tests.signals.reference import standard_normal


def predict(params, x, y):
    del y
    return jnp.tanh(x @ params["w0"]) @ params["w1"]


def softmax_loss(outputs, x, y):
    del x
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1))


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w0": standard_normal(keys[0], 4, 5),
        "w1": standard_normal(keys[1], 5, 3),
    }
    return params, standard_normal(keys[2], 8, 4), jnp.zeros(8, jnp.int32)


@pytest.mark.parametrize("likelihood", ["softmax", "bernoulli", "gaussian"])
def test_moments_average_to_the_exact_fisher(problem, likelihood):
    params, x, y = problem
    loss = optalr.composite_loss(predict, softmax_loss)
    evaluate = optalr.value_grad_and_extras(loss, fisher="true", likelihood=likelihood)
    keys = jax.random.split(jax.random.key(7), 4096)
    moments = jax.jit(jax.vmap(lambda key: evaluate(params, x, y, key=key)[2]["signals"]))(keys)
    outputs = np.asarray(predict(params, x, y), np.float64)
    if likelihood == "softmax":
        p = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
        blocks = np.einsum("ni,ij->nij", p, np.eye(3)) - np.einsum("ni,nj->nij", p, p)
    elif likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-outputs))
        blocks = np.einsum("ni,ij->nij", p * (1 - p), np.eye(3))
    else:
        blocks = np.broadcast_to(np.eye(3), (8, 3, 3))
    hidden = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["w0"], np.float64))
    back = np.einsum("nh,hk->nhk", 1 - hidden**2, np.asarray(params["w1"], np.float64))
    # 4096 draws of 8 examples: a relative sampling error of about 1/sqrt(32768) = 0.6 %.
    np.testing.assert_allclose(moments["w1"].cols.mean(0), blocks.mean(0), atol=0.02)
    expected = np.einsum("nhi,nij,nkj->hk", back, blocks, back) / 8
    scale = np.abs(expected).max()
    np.testing.assert_allclose(moments["w0"].cols.mean(0), expected, atol=0.03 * scale)
    np.testing.assert_allclose(moments["w1"].rows[0], hidden.T @ hidden / 8, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_targets_in_the_batch(problem):
    params, x, y = problem
    loss = optalr.composite_loss(predict, softmax_loss)
    evaluate = optalr.value_grad_and_extras(loss, fisher="true", likelihood="softmax")
    value, grads, extras = jax.jit(evaluate)(params, x, y, key=jax.random.key(1))
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(params, x, y)
    assert value == expected_value
    jax.tree.map(np.testing.assert_array_equal, grads, expected)
    assert extras["head"].count == 8
    off = evaluate(params, x, y, signals=False, key=jax.random.key(1))[2]["signals"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(off))


def test_bad_input_is_named(problem):
    params, x, y = problem
    loss = optalr.composite_loss(predict, softmax_loss)
    with pytest.raises(TypeError, match="composite_loss"):
        optalr.value_grad_and_extras(lambda p: 0.0, fisher="true", likelihood="softmax")
    with pytest.raises(ValueError, match="likelihood must be one of 'softmax'"):
        optalr.value_grad_and_extras(loss, fisher="true")
    with pytest.raises(ValueError, match="fisher='true'"):
        optalr.value_grad_and_extras(loss, likelihood="softmax")
    with pytest.raises(ValueError, match="fisher must be one of"):
        optalr.value_grad_and_extras(loss, fisher="exact")
    evaluate = optalr.value_grad_and_extras(loss, fisher="true", likelihood="softmax")
    with pytest.raises(TypeError, match="key="):
        evaluate(params, x, y)
