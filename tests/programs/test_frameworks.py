"""``train_step`` with the parameters of each framework, dropout keys, auxiliary outputs, a mesh."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.programs.problem import SIZES, loss_fn, make_batch, make_params

NUM_INPUTS, NUM_CLASSES = SIZES[0], SIZES[-1]


def recipe():
    return optalr.tso_alra(1e-2, switch_at=10, second_learning_rate=1e-2, update_every=5)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained(loss_fn, params, *, arguments, steps=14, has_aux=False):
    """Return losses of ``train_step`` and of the traced step."""
    tx = recipe()
    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=has_aux)

    @jax.jit
    def traced(params, state, *args):
        value, grads, extras = evaluate(params, *args, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    told = optalr.train_step(loss_fn, tx, has_aux=has_aux, donate=False)
    losses = []
    for step in (told, traced):
        ours, state, aux = params, tx.init(params), None
        row = []
        for i in range(steps):
            ours, state, value = step(ours, state, *arguments(i, aux))
            aux = value[1] if has_aux else None
            row.append(float(value[0] if has_aux else value))
        losses.append(row)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert min(losses[0][1:]) < losses[0][0]
    return told


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, *, training):
        x = linen.BatchNorm(use_running_average=not training)(linen.Dense(12)(x))
        return linen.Dense(NUM_CLASSES)(linen.Dropout(0.2, deterministic=not training)(x))


@pytest.mark.slow
def test_linen_with_batch_statistics_and_dropout():
    model, (x, _) = LinenNet(), make_batch(0)
    variables = model.init(jax.random.key(0), x, training=False)

    def loss_fn(params, stats, key, x, y):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            training=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, y), new["batch_stats"]

    def arguments(i, stats):
        stats = variables["batch_stats"] if stats is None else stats
        return stats, jax.random.key(i), *make_batch(i)

    trained(loss_fn, variables["params"], arguments=arguments, has_aux=True)


@pytest.mark.slow
def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(NUM_INPUTS, 12, rngs=rngs)
            self.second = nnx.Linear(12, NUM_CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.tanh(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def loss_fn(params, x, y):
        return cross_entropy(nnx.merge(graph, params)(x), y)

    trained(loss_fn, params, arguments=lambda i, _: make_batch(i))


@pytest.mark.slow
def test_equinox():
    model = eqx.nn.MLP(NUM_INPUTS, NUM_CLASSES, 12, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    trained(loss_fn, params, arguments=lambda i, _: make_batch(i))


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def on_mesh(i, _):
        return jax.device_put(make_batch(i), NamedSharding(mesh, P("data")))

    params = jax.device_put(make_params(), NamedSharding(mesh, P()))
    step = trained(loss_fn, params, arguments=on_mesh)
    assert step.kinds == ["measuring", "refreshing", "second"]
