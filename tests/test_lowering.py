"""Whole training steps lower for accelerators that the tests cannot run on."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optalr
from optalr.linalg import inverse_root


def predict(params, x, y):
    hidden = jax.nn.relu(x @ params["in"] + params["bias"][None])
    return hidden @ params["out"]


def cross_entropy(scores, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, y))


OPTIMIZERS = {
    "tso_alra": lambda: optalr.tso_alra(1e-2, switch_at=100),
    "tso_alra, gradient statistics": lambda: optalr.tso_alra(1e-2, statistics="gradient"),
    "edf": lambda: optalr.edf(1.0, num_steps=2, acceleration="W1"),
    "learned_rate_sgd": lambda: optalr.learned_rate_sgd(1e-2),
    "lipschitz_sgd": lambda: optalr.lipschitz_sgd("softmax", num_classes=4),
}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_lowers(name, platform):
    loss_fn = optalr.composite_loss(predict, cross_entropy)
    evaluate = optalr.value_grad_and_extras(loss_fn)
    tx = OPTIMIZERS[name]()
    params = {"in": jnp.ones((6, 5)), "bias": jnp.zeros(5), "out": jnp.ones((5, 4))}
    state = tx.init(params)

    def step(params, state, x, y):
        flag = optalr.wants_signals(state)
        loss, grads, extras = evaluate(params, x, y, signals=flag)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, loss

    batch = jax.ShapeDtypeStruct((8, 6), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    exported = jax.export.export(jax.jit(step), platforms=[platform])(params, state, *batch)
    assert exported.platforms == (platform,)


@pytest.mark.parametrize("method", ["auto", "eigh", "coupled_newton", "cholesky_polar"])
@pytest.mark.parametrize("p", [1, 4])
def test_roots_other_than_the_square_root_lower_for_a_tpu(p, method):
    shape = jax.ShapeDtypeStruct((2, 24, 24), jnp.float32)
    root = jax.jit(lambda matrix: inverse_root(matrix, p, method=method))
    assert jax.export.export(root, platforms=["tpu"])(shape).platforms == ("tpu",)


def test_powers_that_are_known_only_at_run_time_lower_for_a_tpu():
    shape = jax.ShapeDtypeStruct((2, 24, 24), jnp.float32)
    exported = jax.export.export(jax.jit(inverse_root), platforms=["tpu"])(shape, jnp.float32(2.5))
    assert exported.platforms == ("tpu",)
