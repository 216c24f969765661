import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import optalr
from optalr.adapters import linen as linen_adapter
from optalr.adapters import nnx as nnx_adapter

X = jax.random.normal(jax.random.key(1), (12, 3))
Y = jnp.argmax(X, axis=1)


@functools.cache  # one transformation, so that its steps are compiled once
def make_tx():
    options = optalr.KroneckerOptions(min_batches=1)
    return optalr.tso_alra(0.05, switch_at=4, update_every=2, signals_every=1, options=options)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))
        return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.drop(nnx.relu(self.norm(self.first(x)))))


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class BatchStatsState(linen_adapter.TrainState):
    batch_stats: object = None


@functools.cache
def linen_start():
    model = LinenNet()
    variables = model.init({"params": jax.random.key(0)}, X, train=False)

    def loss_fn(params, batch_stats, x, y, key):
        logits, changed = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return cross_entropy(logits, y), changed["batch_stats"]

    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)

    @jax.jit
    def step(state):
        key = jax.random.fold_in(jax.random.key(7), state.step)
        (loss, stats), grads, extras = evaluate(
            state.params, state.batch_stats, X, Y, key, signals=state.wants_signals
        )
        return state.apply_gradients(grads=grads, extras=extras, batch_stats=stats), loss

    state = BatchStatsState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=make_tx(),
        batch_stats=variables["batch_stats"],
    )
    return state.replace(step=jnp.zeros((), jnp.int32)), step


def nnx_start():
    model = NnxNet(nnx.Rngs(0))
    return model, nnx_adapter.Optimizer(model, make_tx(), wrt=nnx.Param), nnx_step()


@functools.cache
def nnx_step():
    evaluate = nnx_adapter.value_grad_and_extras(lambda model, x, y: cross_entropy(model(x), y))

    @nnx.jit
    def step(model, optimizer):
        loss, grads, extras = evaluate(model, X, Y, signals=optimizer.wants_signals)
        optimizer.update(model, grads, **extras)
        return loss

    return step


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def save_and_restore(path, tree):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.eval_shape(lambda: tree))


def test_linen_trains_and_passes_extras():
    state, step = linen_start()
    losses = []
    for _ in range(8):
        stats = state.batch_stats
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert int(state.step) == 8
    assert float(optalr.metrics(state.opt_state)["phase"]) == 1
    assert np.any(state.batch_stats["BatchNorm_0"]["mean"] != stats["BatchNorm_0"]["mean"])


def test_linen_without_extras_is_flax():
    params = {"w": jnp.ones(3)}
    ours, theirs = (
        cls.create(apply_fn=None, params=params, tx=optax.adam(0.1))
        for cls in (linen_adapter.TrainState, train_state.TrainState)
    )
    ours, theirs = (state.apply_gradients(grads=params) for state in (ours, theirs))
    assert_equal(ours.params, theirs.params)
    assert ours.tx is not None
    with pytest.raises(TypeError, match="signals"):
        linen_adapter.TrainState.create(
            apply_fn=None, params={"w": jnp.ones((2, 2))}, tx=make_tx()
        ).apply_gradients(grads={"w": jnp.ones((2, 2))})


@pytest.mark.parametrize("at", [1, 4, 6])
def test_linen_resumes_bit_for_bit_in_any_phase(at, tmp_path):
    state, step = linen_start()
    for _ in range(at):
        state, _ = step(state)
    arrays = {"params": state.params, "opt_state": state.opt_state}
    arrays |= {"batch_stats": state.batch_stats, "step": state.step}
    restored = state.replace(**save_and_restore(tmp_path / "run", arrays))
    for _ in range(3):
        state, loss = step(state)
        restored, restored_loss = step(restored)
        assert float(loss) == float(restored_loss)
    assert_equal(restored, state)


def test_nnx_trains_and_updates_statistics_once():
    model, optimizer, step = nnx_start()
    losses, counts = [], []
    for _ in range(8):
        losses.append(float(step(model, optimizer)))
        counts.append(int(model.drop.rngs.count[...]))
    assert losses[-1] < losses[0]
    assert counts == list(range(1, 9))
    assert float(optimizer.metrics["phase"]) == 1
    assert int(optimizer.step[...]) == 8
    assert np.any(model.norm.mean[...] != 0)


def test_nnx_does_what_bare_jax_does():
    model, optimizer, step = nnx_start()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest, tx = nnx.as_pure(params), nnx.as_pure(rest), make_tx()

    def loss_fn(params, rest):
        merged = nnx.merge(graphdef, params, rest)
        value = cross_entropy(merged(X), Y)
        return value, nnx.as_pure(nnx.split(merged, nnx.Param, ...)[2])

    evaluate = optalr.value_grad_and_extras(loss_fn, has_aux=True)

    @jax.jit
    def bare(params, rest, state):
        (_, rest), grads, extras = evaluate(params, rest, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), rest, state

    state = tx.init(params)
    for _ in range(6):
        step(model, optimizer)
        params, rest, state = bare(params, rest, state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        nnx.as_pure(nnx.state(model, nnx.Param)),
        params,
    )


@pytest.mark.parametrize("at", [1, 4, 6])
def test_nnx_resumes_bit_for_bit_in_any_phase(at, tmp_path):
    model, optimizer, step = nnx_start()
    for _ in range(at):
        step(model, optimizer)
    keyless = nnx.All(nnx.Not(nnx.RngKey))  # Orbax stores arrays; keys are made anew by the seed
    saved = [nnx.as_pure(nnx.state(part, keyless)) for part in (model, optimizer)]
    restored = save_and_restore(tmp_path / "run", saved)
    other_model, other_optimizer, other_step = nnx_start()
    for part, values in zip((other_model, other_optimizer), restored, strict=True):
        nnx.update(part, values)
    for _ in range(3):
        assert float(step(model, optimizer)) == float(other_step(other_model, other_optimizer))
    assert_equal(
        nnx.as_pure(nnx.state(other_model, keyless)), nnx.as_pure(nnx.state(model, keyless))
    )
    assert_equal(
        nnx.as_pure(nnx.state(other_optimizer, keyless)), nnx.as_pure(nnx.state(optimizer, keyless))
    )
