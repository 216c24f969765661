"""A small net, its batches, its meshes and its two kinds of steps, for tests of shared roots."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

import optalr

AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(*shape, axes="auto"):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AXES[axes],) * len(shape))


# Layers that no number of devices divides, and layers that eight devices divide.
SIZES, EVEN = (6, 12, 12, 9, 4), (8, 16, 16, 24, 8)


def make_params(sizes=SIZES):
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        f"kernel{i}": jax.random.normal(keys[i], (m, n)) / m**0.5
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def loss_fn(params, inputs, targets):
    hidden = inputs
    for i in range(len(params)):
        hidden = hidden @ params[f"kernel{i}"]
        hidden = jnp.tanh(hidden) if i < len(params) - 1 else hidden
    return jnp.mean((hidden - targets) ** 2)


def make_batch(seed, sizes=SIZES):
    inputs = jax.random.normal(jax.random.key(seed), (16, sizes[0]))
    return inputs, jnp.sin(3 * inputs[:, : sizes[-1]])


def traced(tx, out_shardings=None):
    evaluate = optalr.value_grad_and_extras(loss_fn)

    @functools.partial(jax.jit, out_shardings=out_shardings)
    def step(params, state, *batch):
        value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    return step


def told(tx):
    return optalr.train_step(loss_fn, tx)


def placed(tree, mesh, spec):
    """Return a tree on a mesh, or as it is without one."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))


def assert_alike(tree):
    """Check that every device has the same bits of each replicated array."""
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.is_fully_replicated:
            first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
            for other in others:
                np.testing.assert_array_equal(first, other)
