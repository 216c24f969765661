"""Networks, moments and runs that the tests of the Lipschitz rate share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optalr
from optalr.signals.moments import LayerMoments
from tests.transforms.compiling import quick_jit

CLASSES = 3
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def network(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "first": {"w": jax.random.normal(keys[0], (4, 6)), "b": jnp.zeros(6)},
        "last": {"w": jax.random.normal(keys[1], (6, CLASSES)), "b": jnp.zeros(CLASSES)},
    }
    x = jax.random.normal(keys[2], (8, 4))
    return params, x, jax.random.randint(keys[3], (8,), 0, CLASSES)


def hidden(params, x):
    return jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])


def predict(params, x, y):
    return hidden(params, x) @ params["last"]["w"] + params["last"]["b"][None]


def classify(params, x, y):
    return cross_entropy(predict(params, x, y), y).mean()


EVALUATE = quick_jit(optalr.value_grad_and_extras(classify))


def moments(norm, size=8, dim=6):
    """Return moments of a layer whose minibatch of inputs has this Frobenius norm."""
    second = jnp.eye(dim) * (norm**2 / size / dim)
    return LayerMoments(
        rows=second,
        cols=jnp.eye(2),
        row_mean=jnp.zeros(dim),
        col_mean=None,
        count=jnp.float32(size),
        positions=jnp.float32(1),
    )


def feed(tx, norms, **extras):
    """Return the rates that a run of minibatches with these K_z gives, and the last state."""
    w = jnp.ones((6, 2))
    state, rates = tx.init(w), []
    update = quick_jit(tx.update)
    for norm in norms:
        head = moments(jnp.float32(norm))
        _, state = update(w, state, w, head=head, **extras)
        rates.append(float(optalr.metrics(state)["learning_rate"]))
    return np.asarray(rates), state
