"""A small network, three output losses, and data: what the curvature products are tried on."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.signals.reference import standard_normal


def make_mlp(seed=0, sizes=(4, 5, 3)):
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        {"w": standard_normal(k, m, n) / np.sqrt(m), "b": 0.1 * standard_normal(k, n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def predict(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + jnp.broadcast_to(layer["b"], (*x.shape[:-1], 5)))
    last = params[-1]
    return x @ last["w"] + jnp.broadcast_to(last["b"], (*x.shape[:-1], last["b"].size))


def softmax_loss(outputs, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(outputs), axis=-1))


def squared_loss(outputs, y):
    return 0.5 * jnp.sum((outputs - y) ** 2) / outputs.shape[0]


def sigmoid_loss(outputs, y):
    return jnp.mean(jax.nn.softplus(outputs) - y * outputs)


LOSSES = {"softmax": softmax_loss, "squared": squared_loss, "sigmoid": sigmoid_loss}


def problem(shape=(6,), seed=1):
    params = make_mlp()
    kx, ky = jax.random.split(jax.random.key(seed))
    x = standard_normal(kx, *shape, 4)
    y = jax.nn.softmax(standard_normal(ky, *shape, 3))
    return params, x, y
