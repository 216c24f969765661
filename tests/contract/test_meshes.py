"""Every method on a mesh of eight devices, whose axes are explicit or left to the compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.contract.registry import METHODS
from tests.contract.test_contract import assert_same_types

NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES, NUM_EXAMPLES, NUM_STEPS = 8, 16, 8, 16, 4

# How parameters lie on the axis that the batch is sharded over: not at all, or along either axis.
LAYOUTS = {
    "replicated": dict.fromkeys(("hidden/kernel", "output/kernel", "hidden/bias"), P()),
    "sharded": {
        "hidden/kernel": P("data", None),
        "output/kernel": P(None, "data"),
        "hidden/bias": P("data"),
    },
}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_params():
    first, second = jax.random.split(jax.random.key(0))
    return {
        "hidden/kernel": 0.3 * jax.random.normal(first, (NUM_INPUTS, NUM_HIDDEN)),
        "hidden/bias": jnp.full(NUM_HIDDEN, 0.1),
        "output/kernel": 0.3 * jax.random.normal(second, (NUM_HIDDEN, NUM_CLASSES)),
    }


def make_batch(seed):
    inputs = jax.random.normal(jax.random.key(seed), (NUM_EXAMPLES, NUM_INPUTS))
    return inputs, jax.nn.one_hot(jnp.argmax(inputs, 1), NUM_CLASSES)


def predict(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["hidden/kernel"] + params["hidden/bias"][None])
    return hidden @ params["output/kernel"]


def gathered(params, inputs, targets):
    """The model as one writes it for explicit axes: parameters are gathered where they are used."""
    whole = jax.tree.map(lambda leaf: jax.sharding.reshard(leaf, P()), params)
    return predict(whole, inputs, targets)


def output_loss(logits, inputs, targets):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, 1))


def step_of(tx, model):
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(model, output_loss))

    def step(params, state, batch):
        value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        extras["validation_value"] = value.astype(jnp.float32)
        extras["validation_value_fn"] = extras["value_fn"]
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def train(tx, model, params, batches):
    step, state = step_of(tx, model), tx.init(params)
    for batch in batches:
        before = state
        params, state = step(params, state, batch)
        assert_same_types(state, before)
    return jax.tree.map(np.asarray, params), state


@functools.cache
def alone(method):
    """Return the parameters that one device ends with."""
    batches = [make_batch(seed) for seed in range(NUM_STEPS)]
    return train(method.make(), predict, make_params(), batches)[0]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ("explicit", "sharded"),
        pytest.param("explicit", "replicated", marks=pytest.mark.slow),
        pytest.param("auto", "replicated", marks=pytest.mark.slow),
        pytest.param("auto", "sharded", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(method, axes, layout):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AXES[axes],))
    specs = LAYOUTS[layout]
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs[name]))
        for name, leaf in make_params().items()
    }
    sharding = NamedSharding(mesh, P("data"))
    batches = [jax.device_put(make_batch(seed), sharding) for seed in range(NUM_STEPS)]
    model = gathered if (axes, layout) == ("explicit", "sharded") else predict
    with jax.set_mesh(mesh):
        ended, _ = train(method.make(), model, params, batches)
    for name, leaf in alone(method).items():
        scale = float(np.abs(leaf).max())
        np.testing.assert_allclose(ended[name], leaf, rtol=method.rtol, atol=method.rtol * scale)


def test_state_like_a_parameter_is_sharded_as_that_is():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    leaf = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
        for tx in (optalr.swats(1e-2), optalr.scale_by_local_gains()):
            state = tx.init({"w": leaf})
            kept = [x for x in jax.tree.leaves(state) if x.shape == leaf.shape]
            assert kept
            assert all(jax.typeof(x).sharding.spec == P("data", None) for x in kept)
