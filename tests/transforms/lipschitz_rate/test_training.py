"""Networks trained at the Lipschitz rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.transforms.compiling import quick_jit
from tests.transforms.lipschitz_rate.problems import cross_entropy, network


def test_the_defaults_keep_a_deep_net_alive_at_which_the_papers_rule_breaks_down():
    keys = jax.random.split(jax.random.key(1), 6)
    sizes = [(8, 32), (32, 32), (32, 32), (32, 3)]
    params = [
        jax.random.normal(k, n) * (2 / n[0]) ** 0.5 for k, n in zip(keys, sizes, strict=False)
    ]
    x = jax.random.normal(keys[4], (64, 8))
    y = jnp.argmax(jnp.abs(x[:, :3]), axis=1)

    def loss_fn(params):
        h = x
        for w in params[:-1]:
            h = jax.nn.relu(h @ w)
        return cross_entropy(h @ params[-1], y).mean()

    evaluate = optalr.value_grad_and_extras(loss_fn)

    def train(guards):
        tx = optalr.lipschitz_sgd("softmax", num_classes=3, guards=guards)

        def body(carry, _):
            params, state = carry
            value, grads, extras = evaluate(params, signals=True)
            updates, state = tx.update(grads, state, params, **extras)
            return (optax.apply_updates(params, updates), state), value

        run = quick_jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=60)[1])
        return run(params)

    assert train("on")[-1] < 0.1
    assert not train("off")[-1] < 1.0  # log 3 is 1.099: dead


@pytest.mark.parametrize("make", [optalr.lipschitz_sgd, optalr.lipschitz_adam])
def test_trains_with_batch_norm_and_dropout(make):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(3)(nn.Dropout(0.25, deterministic=not train)(x))

    _, x, y = network()
    net = Net()
    variables = net.init(jax.random.key(0), x, train=False)

    def loss_fn(params, stats, key, x, y):
        given = {"params": params, "batch_stats": stats}
        scores, new = net.apply(
            given, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return cross_entropy(scores, y).mean(), new["batch_stats"]

    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)
    guards = {"max_rate": 1.0} if make is optalr.lipschitz_sgd else {"max_rate": 0.1}
    tx = make("softmax", num_classes=3, steps_per_epoch=4, guards=guards)

    @quick_jit
    def step(params, stats, state, key):
        wish = optalr.wants_signals(state)
        (value, stats), grads, extras = evaluate(params, stats, key, x, y, signals=wish)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), stats, state, value

    params, stats = variables["params"], variables["batch_stats"]
    state, losses = tx.init(params), []
    for i in range(25):
        params, stats, state, value = step(params, stats, state, jax.random.key(i))
        losses.append(float(value))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
