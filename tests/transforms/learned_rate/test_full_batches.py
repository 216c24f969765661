"""On full batches the published rule has spikes; applied at once, it has none."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optalr

X = jax.random.normal(jax.random.key(0), (64, 6))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (6, 3)))


def make_params(seed):
    key = jax.random.key(seed)
    first = {"w": jax.random.normal(key, (6, 16)) / 3, "b": jnp.zeros(16)}
    return {"first": first, "last": {"w": jax.random.normal(key, (16, 3)) / 4, "b": jnp.zeros(3)}}


def loss_fn(params):
    first, last = params["first"], params["last"]
    hidden = jnp.tanh(X @ first["w"] + first["b"][None])
    return jnp.mean((hidden @ last["w"] + last["b"][None] - Y) ** 2)


def losses_of(tx, seed):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    def step(carry, _):
        params, state = carry
        loss, grads, extras = evaluate(params, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return (optax.apply_updates(params, updates), state), loss

    params = make_params(seed)
    return jax.jit(lambda start: jax.lax.scan(step, start, None, 100)[1])((params, tx.init(params)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_rule_of_the_paper_has_spikes_that_one_without_a_lag_has_not(seed):
    published = losses_of(optalr.learned_rate_sgd(1e-2), seed)
    at_once = losses_of(optalr.learned_rate_sgd(1e-2, lag=False), seed)
    assert jnp.max(published) > 1e3 * published[0]
    assert published[-1] < 0.3
    assert jnp.max(at_once) <= at_once[0]
    assert at_once[-1] < 0.01
