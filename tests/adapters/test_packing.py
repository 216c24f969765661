"""The stock training state of Flax trains every method, with extras packed beside gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

import optalr
from optalr.adapters.packing import pack_extras, unpack_extras

X = jax.random.normal(jax.random.key(1), (12, 3))
Y = jnp.argmax(X, axis=1)
MODEL = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
PARAMS = MODEL.init(jax.random.key(0), X)


def loss_fn(params, x, y):
    logits = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


evaluate = optalr.value_grad_and_extras(loss_fn)
METHODS = {
    "tso_alra": lambda: optalr.tso_alra(0.05, switch_at=4, update_every=2, signals_every=1),
    "untuned": lambda: optalr.untuned(8),
    "learned_rate_sgd": lambda: optalr.learned_rate_sgd(0.1),
    "lipschitz_sgd": lambda: optalr.lipschitz_sgd("softmax_cross_entropy", num_classes=3),
    "adam": lambda: optax.adam(1e-2),
}


def stock_run(tx, steps=6):
    state = train_state.TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=unpack_extras(tx))

    @jax.jit
    def step(state):
        wanted = optalr.wants_signals(state.opt_state)
        loss, grads, extras = evaluate(state.params, X, Y, signals=wanted)
        return state.apply_gradients(grads=pack_extras(grads, extras)), loss

    for _ in range(steps):
        state, loss = step(state)
    return state, loss


def plain_run(tx, steps=6):
    tx = optax.with_extra_args_support(tx)
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        wanted = optalr.wants_signals(state)
        loss, grads, extras = evaluate(params, X, Y, signals=wanted)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, loss = step(params, state)
    return params, loss


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_stock_state_of_flax_does_what_a_plain_loop_does(name):
    state, loss = stock_run(METHODS[name]())
    params, plain_loss = plain_run(METHODS[name]())
    assert int(state.step) == 6
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 state.params, params)  # fmt: skip


@pytest.mark.parametrize(
    "make", [optalr.tso_alra, pytest.param(optalr.untuned, marks=pytest.mark.slow)]
)
def test_statistics_of_gradients_need_no_extras(make):
    tx = make(20 if make is optalr.untuned else 0.05, statistics="gradient")
    state = train_state.TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx)

    def step(state):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, X, Y)
        return state.apply_gradients(grads=grads), loss

    # Shapes are enough: the numbers are those of the contract's suite.
    new_state, loss = jax.eval_shape(step, state)
    assert jax.tree.map(jnp.shape, new_state.params) == jax.tree.map(jnp.shape, state.params)
    assert loss.shape == ()


@pytest.mark.slow
def test_packed_extras_may_cross_a_compiled_step():
    traces = []
    tx = unpack_extras(optalr.learned_rate_sgd(0.1))

    @jax.jit
    def update(packed, state, params):
        traces.append(1)
        return tx.update(packed, state, params)

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        _, grads, extras = evaluate(params, X, Y, signals=False)
        updates, state = update(pack_extras(grads, extras), state, params)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1


def test_gradients_without_extras_pass_and_extras_may_come_both_ways():
    seen = {}

    def update(updates, state, params=None, **extras):
        seen.update(extras)
        return updates, state

    tx = unpack_extras(optax.GradientTransformationExtraArgs(lambda _: (), update))
    assert tx.update(PARAMS, (), PARAMS)[0] is PARAMS
    assert seen == {}
    packed = pack_extras(PARAMS, {"value": 1.0, "point": 2.0})
    assert tx.update(packed, (), PARAMS, value=3.0)[0] is PARAMS
    assert seen == {"value": 3.0, "point": 2.0}


def test_what_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match="inner must be"):
        unpack_extras(optax.sgd)  # the factory, not what it makes
