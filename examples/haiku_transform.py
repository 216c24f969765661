"""Haiku: a transformed function with dropout; no adapter is needed.

Run it with ``python examples/haiku_transform.py``; it ends with the test accuracy on scikit-learn's
digits.
"""

from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import optalr

NUM_STEPS = 200

digits: Any = load_digits()  # 1797 images of 8 x 8 pixels
order = np.random.default_rng(0).permutation(len(digits.data))
x, y = np.asarray(digits.data[order] / 16.0, np.float32), digits.target[order]


def forward(x: jax.Array, is_training: bool) -> jax.Array:
    x = jax.nn.tanh(hk.Linear(64)(x))
    x = hk.dropout(hk.next_rng_key(), 0.1, x) if is_training else x
    return hk.Linear(10)(x)


net = hk.transform(forward)


def loss_fn(params: hk.Params, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = net.apply(params, key, x, is_training=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = net.init(jax.random.key(0), x[:1], is_training=True)
evaluate = optalr.value_grad_and_extras(loss_fn)
tx = optalr.tso_alra(1e-2)
opt_state = tx.init(params)


@jax.jit
def step(
    params: hk.Params, opt_state: Any, key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[Any, Any, jax.Array]:
    signals = optalr.wants_signals(opt_state)
    loss, grads, extras = evaluate(params, key, x, y, signals=signals)
    updates, opt_state = tx.update(grads, opt_state, params, **extras)
    return optax.apply_updates(params, updates), opt_state, loss


rng = np.random.default_rng(1)
for key in jax.random.split(jax.random.key(1), NUM_STEPS):
    batch = rng.choice(1400, 128, replace=False)
    params, opt_state, loss = step(params, opt_state, key, x[batch], y[batch])
logits = net.apply(params, None, x[1400:], is_training=False)
print(f"test accuracy {(logits.argmax(1) == y[1400:]).mean():.3f}")
