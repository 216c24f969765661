"""Flax linen with its stock ``TrainState``: three lines of an ordinary training script change.

The lines are marked. Run it with ``python examples/linen_train_state.py``; it ends with the test
accuracy on scikit-learn's digits.
"""

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import optalr
from optalr.adapters.packing import pack_extras, unpack_extras

NUM_STEPS = 200

digits: Any = load_digits()  # 1797 images of 8 x 8 pixels
order = np.random.default_rng(0).permutation(len(digits.data))
x, y = np.asarray(digits.data[order] / 16.0, np.float32), digits.target[order]


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Dense(64)(x))
        return nn.Dense(10)(x)


model = MLP()


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits: Any = model.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


params = model.init(jax.random.key(0), x[:1])["params"]
tx = unpack_extras(optalr.tso_alra(1e-2))  # 1: was optax.adam(1e-3)
state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
evaluate = optalr.value_grad_and_extras(loss_fn)  # 2: was jax.value_and_grad(loss_fn)


@jax.jit
def step(state: TrainState, x: jax.Array, y: jax.Array) -> tuple[TrainState, jax.Array]:
    signals = optalr.wants_signals(state.opt_state)
    loss, grads, extras = evaluate(state.params, x, y, signals=signals)
    return state.apply_gradients(grads=pack_extras(grads, extras)), loss  # 3: was grads=grads


rng = np.random.default_rng(1)
for _ in range(NUM_STEPS):
    batch = rng.choice(1400, 128, replace=False)
    state, loss = step(state, x[batch], y[batch])
logits: Any = model.apply({"params": state.params}, x[1400:])
print(f"test accuracy {(logits.argmax(1) == y[1400:]).mean():.3f}")
