"""Problems and steps that the tests of the learned rate share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from tests.transforms.compiling import quick_jit


def quadratic(seed=0, size=6, scale=1.0):
    """Return (loss, H, w): ``scale`` times ½ (w−w*)ᵀH(w−w*), positive definite."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    hessian = (root @ root.T / size + np.eye(size)) * scale
    target, start = rng.normal(size=(2, size))

    def loss(w):
        offset = w - jnp.asarray(target, w.dtype)
        return 0.5 * offset @ jnp.asarray(hessian, w.dtype) @ offset

    return loss, hessian, jnp.asarray(start)


def network(key=0, dtype=jnp.float32, width=8):
    """Return (loss_fn(params, x, y), params, (x, y)) of a two-layer tanh network."""
    keys = jax.random.split(jax.random.key(key), 4)
    params = {
        "hidden": {
            "w": jax.random.normal(keys[0], (5, width), dtype),
            "b": jnp.zeros(width, dtype),
        },
        "out": {"w": jax.random.normal(keys[1], (width, 3), dtype) / 3, "b": jnp.zeros(3, dtype)},
    }
    batch = jax.random.normal(keys[2], (16, 5), dtype), jax.random.randint(keys[3], (16,), 0, 3)

    def loss_fn(p, x, y):
        hidden = jnp.tanh(x @ p["hidden"]["w"] + p["hidden"]["b"][None])
        scores = hidden @ p["out"]["w"] + p["out"]["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    return loss_fn, params, batch


def one_step(tx, loss, w, state=None, **extras):
    return _one_step(tx, loss, w, tx.init(w) if state is None else state, extras)


def traced_step(tx, loss, w, state):
    value, grads = jax.value_and_grad(loss)(w)
    updates, state = tx.update(grads, state, w, value_fn=Partial(loss), value=value, grad=grads)
    return optax.apply_updates(w, updates), state


@functools.partial(quick_jit, static_argnums=(0, 1))
def _one_step(tx, loss, w, state, extras):
    value, grads = jax.value_and_grad(loss)(w)
    given = {"value_fn": Partial(loss), "value": value, "grad": grads, **extras}
    updates, state = tx.update(grads, state, w, **given)
    return optax.apply_updates(w, updates), state
