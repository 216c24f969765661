"""Equinox: the arrays of a module are the parameters; no adapter is needed.

Run it with ``python examples/equinox_module.py``; it ends with the test accuracy on scikit-learn's
digits.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import optalr

NUM_STEPS = 200

digits: Any = load_digits()  # 1797 images of 8 x 8 pixels
order = np.random.default_rng(0).permutation(len(digits.data))
x, y = np.asarray(digits.data[order] / 16.0, np.float32), digits.target[order]

model = eqx.nn.MLP(64, 10, width_size=64, depth=1, activation=jax.nn.tanh, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = jax.vmap(eqx.combine(params, static))(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


evaluate = optalr.value_grad_and_extras(loss_fn)
# The report says which leaves are layers, so that the state has factors for these and no others.
tx = optalr.tso_alra(1e-2, layout=optalr.coverage(loss_fn, params, x[:128], y[:128]))
opt_state = tx.init(params)


@jax.jit
def step(params: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, grads, extras = evaluate(params, x, y, signals=optalr.wants_signals(opt_state))
    updates, opt_state = tx.update(grads, opt_state, params, **extras)
    return eqx.apply_updates(params, updates), opt_state, loss


rng = np.random.default_rng(1)
for _ in range(NUM_STEPS):
    batch = rng.choice(1400, 128, replace=False)
    params, opt_state, loss = step(params, opt_state, x[batch], y[batch])
logits = jax.vmap(eqx.combine(params, static))(x[1400:])
print(f"test accuracy {(logits.argmax(1) == y[1400:]).mean():.3f}")
