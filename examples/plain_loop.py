"""A plain JAX loop: parameters in a dict, a step of one's own, and the state read while it trains.

Run it with ``python examples/plain_loop.py``. It trains on scikit-learn's digits, prints a line
every 50 steps, and ends with the test accuracy.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optalr

Params = dict[str, jax.Array]
NUM_STEPS = 200

digits: Any = load_digits()  # 1797 images of 8 x 8 pixels
order = np.random.default_rng(0).permutation(len(digits.data))
x, y = np.asarray(digits.data[order] / 16.0, np.float32), digits.target[order]


def predict(params: Params, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


keys = jax.random.split(jax.random.key(0))
params: Params = {
    "w1": jax.random.normal(keys[0], (64, 64)) / 8,
    "b1": jnp.zeros(64),
    "w2": jax.random.normal(keys[1], (64, 10)) / 8,
    "b2": jnp.zeros(10),
}
evaluate = optalr.value_grad_and_extras(loss_fn)
tx = optax.chain(
    optax.clip_by_global_norm(1.0),  # any transformation of optax may stand beside ours
    optalr.tso_alra(1e-2, switch_at=150),
)
opt_state = tx.init(params)


@jax.jit
def step(params: Params, opt_state: Any, x: Any, y: Any) -> tuple[Any, Any, jax.Array]:
    signals = optalr.wants_signals(opt_state)  # measure layers only if this update reads them
    loss, grads, extras = evaluate(params, x, y, signals=signals)
    updates, opt_state = tx.update(grads, opt_state, params, **extras)
    return optax.apply_updates(params, updates), opt_state, loss


rng = np.random.default_rng(1)
for i in range(NUM_STEPS):
    batch = rng.choice(1400, 128, replace=False)
    params, opt_state, loss = step(params, opt_state, x[batch], y[batch])
    if i % 50 == 49:
        seen = optalr.metrics(opt_state)
        print(f"step {i + 1}: loss {loss:.4f}, phase {float(seen['phase']):.0f}")
accuracy = (predict(params, jnp.asarray(x[1400:])).argmax(1) == y[1400:]).mean()
print(f"test accuracy {accuracy:.3f}")
