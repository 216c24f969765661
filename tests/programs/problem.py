"""A small net and its batches, for tests of compiled steps."""

import itertools

import jax
import jax.numpy as jnp
import optax

import optalr

SIZES = (20, 16, 5)


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    pairs = itertools.pairwise(SIZES)
    return {
        f"layer{i}": {"kernel": jax.random.normal(keys[i], pair) / pair[0] ** 0.5,
                      "bias": jnp.zeros(pair[1])}
        for i, pair in enumerate(pairs)
    }  # fmt: skip


def loss_fn(params, inputs, labels):
    hidden = inputs
    for i in range(len(params)):
        layer = params[f"layer{i}"]
        hidden = hidden @ layer["kernel"] + layer["bias"][None]
        hidden = jnp.tanh(hidden) if i < len(params) - 1 else hidden
    return optax.softmax_cross_entropy_with_integer_labels(hidden, labels).mean()


def make_batch(seed, size=64):
    inputs = jax.random.normal(jax.random.key(seed), (size, SIZES[0]))
    return inputs, (inputs[:, 0] > 0).astype(jnp.int32) + 2 * (inputs[:, 1] > 0)


def traced_step(tx):
    """Return the step that asks its clocks on the device."""
    evaluate = optalr.value_grad_and_extras(loss_fn)

    @jax.jit
    def step(params, state, *batch, extras):
        value, grads, found = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **{**found, **extras})
        return optax.apply_updates(params, updates), state, value

    return step


def copied(tree):
    return jax.tree.map(jnp.copy, tree)
