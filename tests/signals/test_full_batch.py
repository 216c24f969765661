"""Chunked sums against one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.signals.reference import standard_normal


def predict(params, x, y):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def output_loss(z, x, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=-1))


LOSS = optalr.composite_loss(predict, output_loss)
PARAMS = {
    "w1": standard_normal(0, 4, 5),
    "w2": standard_normal(1, 5, 3),
}
X = np.asarray(standard_normal(2, 11, 4))
Y = np.asarray(jax.nn.softmax(standard_normal(3, 11, 3)))


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize("loop", ["scan", "unroll", "python"])
@pytest.mark.parametrize("chunk_size", [4, 11, 20])
def test_chunks_sum_to_the_whole_batch(loop, chunk_size):
    evaluate = optalr.full_batch(LOSS, chunk_size=chunk_size, loop=loop)
    v = jax.tree.map(jnp.cos, PARAMS)

    def probe(evaluate, params, x, y):
        value, grads, extras = evaluate(params, x, y)
        moved = extras["value_fn"](v)
        return value, grads, extras["hessian"](v), extras["gauss_newton"](v), moved

    run = probe if loop == "python" else jax.jit(probe, static_argnums=0)
    expected = jax.jit(probe, static_argnums=0)(optalr.value_grad_and_extras(LOSS), PARAMS, X, Y)
    assert_close(run(evaluate, PARAMS, X, Y), expected)


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_a_full_batch_step_in_chunks_is_the_step_of_the_whole(loop):
    tx = optalr.edf(1.0, num_steps=3, damping=(0.01, 0.0))

    def step(evaluate, x, y):
        _, grads, extras = evaluate(PARAMS, x, y)
        return optax.apply_updates(PARAMS, tx.update(grads, tx.init(PARAMS), PARAMS, **extras)[0])

    evaluate = optalr.full_batch(LOSS, chunk_size=4, loop=loop)
    run = step if loop == "python" else jax.jit(step, static_argnums=0)
    whole = jax.jit(step, static_argnums=0)(optalr.value_grad_and_extras(LOSS), X, Y)
    assert_close(run(evaluate, X, Y), whole)


def test_what_is_not_a_batch_goes_whole_to_every_chunk():
    def loss(params, x, scale):
        return jnp.mean((x @ params["w1"]) ** 2) * jnp.sum(scale)

    evaluate = optalr.full_batch(loss, chunk_size=3, batch_argnums=(0,))
    scale = jnp.arange(2.0)
    value, grads, extras = evaluate(PARAMS, X, scale)
    expected = jax.value_and_grad(loss)(PARAMS, X, scale)
    assert_close((value, grads), expected)
    assert "gauss_newton" not in extras


@pytest.mark.parametrize("loop", ["scan", "python"])
def test_a_loop_written_for_value_grad_and_extras_runs(loop):
    tx = optalr.edf(1.0, num_steps=2)
    evaluate = optalr.full_batch(LOSS, chunk_size=4, loop=loop)

    def step(params, state, x, y):
        value, grads, extras = evaluate(params, x, y, signals=optalr.wants_signals(state))
        return value, tx.update(grads, state, params, **extras)[0]

    run = step if loop == "python" else jax.jit(step)
    assert_close(run(PARAMS, tx.init(PARAMS), X, Y)[0], LOSS(PARAMS, X, Y))
    grads, extras = evaluate(PARAMS, X, Y, signals=True)[1:]
    kronecker = optalr.scale_by_kronecker()
    with pytest.raises(TypeError, match="signals"):
        kronecker.update(grads, kronecker.init(PARAMS), PARAMS, **extras)


@pytest.mark.parametrize("loop", ["scan", "unroll", "python"])
def test_what_is_not_an_array_reaches_every_chunk_unchanged(loop):
    def flagged(params, x, y, squared):
        return predict(params, x, y) ** (2 if squared else 1)

    loss = optalr.composite_loss(flagged, lambda z, x, y, squared: output_loss(z, x, y))
    evaluate = optalr.full_batch(loss, chunk_size=4, loop=loop, batch_argnums=(0, 1))
    _, _, extras = evaluate(PARAMS, X, Y, True)
    expected = optalr.value_grad_and_extras(loss)(PARAMS, X, Y, True)[2]
    use = (lambda f, v: f(v)) if loop == "python" else jax.jit(lambda f, v: f(v))
    for name in ("value_fn", "hessian", "gauss_newton"):
        assert_close(use(extras[name], PARAMS), expected[name](PARAMS))


def test_memory_is_that_of_a_chunk():
    x, y = np.ones((4096, 4), np.float32), np.ones((4096, 3), np.float32) / 3

    def temporary_bytes(chunk_size):
        evaluate = optalr.full_batch(LOSS, chunk_size=chunk_size)

        def product(params):
            _, grads, extras = evaluate(params, x, y)
            return extras["gauss_newton"](grads)

        compiled = jax.jit(product).lower(PARAMS).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(128) < temporary_bytes(4096) / 4


@pytest.mark.parametrize("loop", ["scan", pytest.param("unroll", marks=pytest.mark.slow), "python"])
def test_sums_of_half_precision_terms_are_taken_in_float32(loop):
    num_chunks = 2048 if loop == "scan" else 320
    params = jnp.ones(2, jnp.bfloat16)
    # Every term is exactly one in bfloat16.
    x = jnp.ones((num_chunks, 2), jnp.bfloat16)
    loss = optalr.composite_loss(lambda w, x: x @ w, lambda z, x: jnp.mean(z**2) / 4)
    evaluate = optalr.full_batch(loss, chunk_size=1, loop=loop)

    def probe(params, x):
        value, grads, extras = evaluate(params, x)
        products = [extras[name](params) for name in ("hessian", "gauss_newton")]
        return value, extras["value_fn"](params), grads, *products

    value, again, *gradients = (probe if loop == "python" else jax.jit(probe))(params, x)
    assert value.dtype == again.dtype == jnp.float32
    np.testing.assert_allclose([value, again], 1.0, rtol=1e-5)
    for gradient in gradients:
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_array_equal(gradient.astype(np.float32), [1.0, 1.0])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="chunk_size"):
        optalr.full_batch(LOSS, chunk_size=0)
    with pytest.raises(ValueError, match="loop"):
        optalr.full_batch(LOSS, chunk_size=4, loop="while")
    with pytest.raises(ValueError, match="batch_argnums"):
        optalr.full_batch(LOSS, chunk_size=4)(PARAMS, X, Y[:5])
    for wrong in ((0, 2), (-1,)):
        with pytest.raises(ValueError, match=r"batch_argnums.*after params"):
            optalr.full_batch(LOSS, chunk_size=4, batch_argnums=wrong)(PARAMS, X, Y)
    for loop in ("scan", "unroll", "python"):
        with pytest.raises(ValueError, match="no examples"):
            optalr.full_batch(LOSS, chunk_size=4, loop=loop)(PARAMS, X[:0], Y[:0])
    aux = optalr.composite_loss(lambda p, x, y: (predict(p, x, y), 0), output_loss, has_aux=True)
    with pytest.raises(ValueError, match="aux"):
        optalr.full_batch(aux, chunk_size=4)
