"""The learned decay in training: against ridge regression on a grid, and where none is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from sklearn.datasets import load_diabetes

import optalr

STRENGTHS = np.geomspace(1e-5, 1e2, 300)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


def synthetic(noise, condition=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(460, 40)), rng.normal(size=(40, 1))
    x = x * np.geomspace(1, condition**-0.5, 40)
    y = x @ weights + noise * rng.normal(size=(460, 1))
    return x[:60], y[:60], x[60:], y[60:]


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]
    order = np.random.default_rng(2).permutation(len(y))
    train, held_out = order[:60], order[60:]
    return x[train], y[train], x[held_out], y[held_out]


def best_on_the_grid(x, y, held_x, held_y):
    """Return the strength whose closed-form ridge solution has the lowest validation loss."""

    def value(strength):
        # Where 2/n Xᵀ(Xw − y) + λw = 0, as the steps below have it.
        matrix = 2 * x.T @ x / len(x) + strength * np.eye(x.shape[1])
        solution = np.linalg.solve(matrix, 2 * x.T @ y / len(x))
        return np.mean((held_x @ solution - held_y) ** 2)

    values = [value(strength) for strength in STRENGTHS]
    return STRENGTHS[np.argmin(values)], min(values)


def train(data, decay, *, rate=0.1, batch=None, num_steps=3000):
    """Return the decays and validation losses along a run of gradient descent."""
    tx = optax.chain(decay, optalr.scale_by_recorded_rate(rate))
    x, y, held_x, held_y = (jnp.asarray(array, jnp.float32) for array in data)
    params = {"w": jnp.zeros((x.shape[1], 1))}

    def draw(key, xs, ys):
        if batch is None:
            return xs, ys
        chosen = jax.random.choice(key, len(xs), (batch,))
        return xs[chosen], ys[chosen]

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key)
        grads = jax.grad(loss_fn)(params, *draw(keys[0], x, y))
        probe_x, probe_y = draw(keys[1], held_x, held_y)
        held_out = Partial(loss_fn, x=probe_x, y=probe_y)
        updates, state = tx.update(grads, state, params, validation_value_fn=held_out)
        params = optax.apply_updates(params, updates)
        decay = optalr.metrics(state)["weight_decay"]
        return (params, state), (decay, loss_fn(params, held_x, held_y))

    keys = jax.random.split(jax.random.key(0), num_steps)
    start = params, tx.init(params)
    return jax.jit(lambda start: jax.lax.scan(step, start, keys)[1])(start)


def settled(series):
    return float(jnp.exp(jnp.mean(jnp.log(series[-len(series) // 4 :]))))


def free(start, **options):
    """Return a learned decay that its bounds do not help."""
    return optalr.add_learned_decay(start, min_factor=1e-6, max_factor=1e6, **options)


@pytest.mark.parametrize("start", [1e-2, 10.0])
@pytest.mark.parametrize("problem", [lambda: synthetic(3.0), diabetes])
def test_it_settles_where_ridge_regression_generalizes_best(problem, start):
    data = problem()
    best, lowest = best_on_the_grid(*data)
    decays, losses = train(data, free(start))
    assert best / 2 < settled(decays) < 2 * best
    assert settled(losses) < 1.01 * lowest


@pytest.mark.parametrize("problem", [lambda: synthetic(3.0), diabetes])
def test_it_settles_there_on_small_batches_too(problem):
    data = problem()
    best, lowest = best_on_the_grid(*data)
    decays, losses = train(data, free(1.0), rate=0.02, batch=20, num_steps=5000)
    assert best / 2 < settled(decays) < 2 * best
    assert settled(losses) < 1.03 * lowest


def test_greed_costs_little_on_ridge_regressions_of_any_curvature():
    """The best decay for the next step need not be the best for the run: how far off that is."""
    problems = [synthetic(3.0, 10.0**power, seed) for power in range(3) for seed in range(8)]
    run = jax.vmap(lambda *data: train(data, free(0.1)))
    decays, losses = run(
        *(jnp.asarray(arrays, jnp.float32) for arrays in zip(*problems, strict=True))
    )
    best, lowest = np.array([best_on_the_grid(*data) for data in problems]).T
    factors = np.exp(np.abs(np.log([settled(d) for d in decays] / best)))
    excess = [settled(loss) for loss in losses] / lowest - 1
    assert np.max(factors) < 3
    assert np.median(factors) < 1.2
    assert np.max(excess) < 0.05
    assert np.median(excess) < 0.005


def test_a_decay_that_can_only_hurt_goes_to_its_lower_bound():
    data = synthetic(0.0)
    decays, losses = train(data, optalr.add_learned_decay(0.1, min_factor=1e-3))
    assert float(decays[-1]) == pytest.approx(1e-4, rel=1e-5)
    fixed, of_fixed = train(data, optalr.add_learned_decay(0.1, meta_rate=0.0))
    np.testing.assert_allclose(fixed, 0.1, rtol=1e-6)
    assert float(losses[-1]) < 1e-3 * float(of_fixed[-1])


def train_by_probe(probe, draw):
    """Return the last decay of a run that probes the loss of its own or of another batch."""
    tx = optax.chain(free(1.0, probe=probe), optalr.scale_by_recorded_rate(0.05))

    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key)
        value_fn, other = (Partial(loss_fn, x=x, y=y) for x, y in map(draw, keys))
        updates, state = tx.update(
            jax.grad(value_fn)(params), state, params, value_fn=value_fn, validation_value_fn=other
        )
        return (optax.apply_updates(params, updates), state), state[0].weight_decay

    params = {"w": jnp.zeros((40, 1))}
    start = params, tx.init(params)
    keys = jax.random.split(jax.random.key(0), 3000)
    return settled(jax.jit(lambda start: jax.lax.scan(step, start, keys)[1])(start))


def test_batches_that_come_once_may_be_probed_before_their_step():
    weights = np.random.default_rng(1).normal(size=(40, 1)).astype(np.float32)

    def fresh(key):
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (8, 40))
        return x, x @ weights + 3 * jax.random.normal(keys[1], (8, 1))

    own, held_out = (train_by_probe(probe, fresh) for probe in ("value_fn", "validation_value_fn"))
    assert 0.7 < own / held_out < 1.4


def test_batches_that_come_again_ask_for_less_decay_than_they_need():
    x, y = (jnp.asarray(array, jnp.float32) for array in synthetic(3.0)[:2])
    own = train_by_probe("value_fn", lambda key: (x, y))
    assert own < 0.01 * best_on_the_grid(*synthetic(3.0))[0]
