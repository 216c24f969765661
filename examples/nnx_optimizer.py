"""Flax nnx: a module with batch normalization and dropout, and an optimizer that passes extras on.

Run it with ``python examples/nnx_optimizer.py``; it ends with the test accuracy on scikit-learn's
digits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optalr
from optalr.adapters import nnx as optalr_nnx

NUM_STEPS = 200

digits: Any = load_digits()  # 1797 images of 8 x 8 pixels
order = np.random.default_rng(0).permutation(len(digits.data))
x, y = jnp.asarray(digits.data[order] / 16.0), jnp.asarray(digits.target[order])


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.drop(nnx.relu(self.norm(self.first(x)))))


def loss_fn(model: MLP, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


model = MLP(nnx.Rngs(0))
optimizer = optalr_nnx.Optimizer(model, optalr.tso_alra(1e-2), wrt=nnx.Param)
evaluate = optalr_nnx.value_grad_and_extras(loss_fn)  # in place of nnx.value_and_grad


@nnx.jit
def step(model: MLP, optimizer: optalr_nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    loss, grads, extras = evaluate(model, x, y, signals=optimizer.wants_signals)
    optimizer.update(model, grads, **extras)
    return loss


rng = np.random.default_rng(1)
for _ in range(NUM_STEPS):
    batch = rng.choice(1400, 128, replace=False)
    loss = step(model, optimizer, x[batch], y[batch])
model.eval()
print(f"test accuracy {(model(x[1400:]).argmax(1) == y[1400:]).mean():.3f}")
