"""A net whose parameters are sharded in every way that people use, and its training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr

NUM_INPUTS, WIDTH, NUM_OUTPUTS, NUM_EXAMPLES = 8, 8, 4, 16
NUM_LAYERS = NUM_EXPERTS = 8
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
DENSE = ("up", "bias", "down")


def make_params(stacks=True):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (NUM_INPUTS, WIDTH)) / NUM_INPUTS**0.5,
        "bias": jnp.full(WIDTH, 0.1),
        "down": jax.random.normal(keys[1], (WIDTH, NUM_OUTPUTS)) / WIDTH**0.5,
    }
    if stacks:
        stack = (NUM_LAYERS, WIDTH, WIDTH)
        params["layers"] = 0.5 * jax.random.normal(keys[2], stack) / WIDTH**0.5
        params["experts"] = jax.random.normal(keys[3], stack) / WIDTH**0.5
    return params


def make_batch(seed):
    inputs = jax.random.normal(jax.random.key(100 + seed), (NUM_EXAMPLES, NUM_INPUTS))
    return inputs, jax.nn.one_hot(jnp.argmax(inputs[:, :NUM_OUTPUTS], 1), NUM_OUTPUTS)


def predict(params, inputs, targets):
    """Return logits; the stacks, where there are any, are scanned layers and a mean of experts."""
    hidden = jnp.tanh(inputs @ params["up"] + params["bias"][None])
    if "layers" in params:

        def layer(hidden, kernel):
            return hidden + jnp.tanh(hidden @ kernel), None

        hidden, _ = jax.lax.scan(layer, hidden, params["layers"])
        opinions = jnp.tanh(jnp.einsum("bi,eio->ebo", hidden, params["experts"]))
        hidden = hidden + opinions.mean(0)
    return hidden @ params["down"]


def gathered(params, inputs, targets):
    """The net as one writes it for explicit axes: parameters are gathered where they are used."""
    return predict(jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params), inputs, targets)


def output_loss(logits, inputs, targets):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, 1))


@functools.cache
def layout():
    """What each leaf is: stacks need to be told."""
    loss = optalr.composite_loss(predict, output_loss)
    return optalr.coverage(loss, make_params(), *make_batch(0))


def make_step(tx, model=predict, **capture):
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(model, output_loss), **capture)

    def step(params, state, *batch):
        value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        extras |= {"validation_value": value, "validation_value_fn": extras["value_fn"]}
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, num_steps, placed=lambda batch: batch):
    for seed in range(num_steps):
        params, state = step(params, state, *placed(make_batch(seed)))
    return jax.tree.map(np.asarray, params), state


def mesh_of(shape, axes="auto"):
    """Return a mesh with the named sizes."""
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AXES[axes],) * len(shape))


def train_sharded(tx, mesh, specs, num_steps, *, batch, stacks=True, **capture):
    """Train with parameters that are sharded so, each where the state says it follows one."""
    explicit = AxisType.Explicit in mesh.axis_types
    params = {
        name: jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))
        for name, leaf in make_params(stacks).items()
    }
    with jax.set_mesh(mesh):
        shardings = optalr.state_shardings(tx, params, mesh)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        wanted = jax.tree.map(lambda leaf: leaf.sharding, params), shardings
        step = make_step(tx, gathered if explicit else predict, **capture)
        step = jax.jit(step, out_shardings=wanted)
        split = NamedSharding(mesh, batch)
        return train(step, params, state, num_steps, lambda arrays: jax.device_put(arrays, split))


def assert_close(found, expected, tolerance):
    """Compare parameters, each by its own largest entry."""
    for name, leaf in expected.items():
        scale = float(np.abs(leaf).max())
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=tolerance * scale, err_msg=name)
