"""What fails on one device fails on all: every device decides alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import optalr
from tests.sharding import net

pytestmark = pytest.mark.slow

# The first update with roots, and what follows it.
BEFORE, AFTER = 2, 4


def make_tx(mesh):
    """Take roots in every update from the second on."""
    options = {"min_batches": 1, "warmup": 0.0}
    settings = {"update_every": 1, "signals_every": 1, "damping": 1e-2}
    return optalr.scale_by_kronecker(mesh=mesh, options=options, **settings)


def spoiled(batch):
    """Return a batch with a NaN in its first example, which lies on one device."""
    inputs, targets = batch
    return inputs.at[0, 0].set(jnp.nan), targets


def run(make_step, mesh, spoil=None, at=BEFORE):
    """Return parameters and state of a short run that is spoiled before one of its steps."""
    tx = make_tx(mesh)
    params = net.placed(net.make_params(), mesh, P())
    state, step = net.placed(tx.init(params), mesh, P()), make_step(tx)
    for seed in range(BEFORE + AFTER):
        batch = net.make_batch(seed)
        if seed == at and spoil is not None:
            batch, state = spoil(batch, state)
        params, state, _ = step(params, state, *net.placed(batch, mesh, P("data")))
        net.assert_alike((params, state))
    return params, state


def inside_shard_map(mesh):
    def make(tx):
        evaluate = optalr.value_grad_and_extras(net.loss_fn, axis_name="data")

        def step(params, state, *batch):
            value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
            updates, state = tx.update(grads, state, params, **extras)
            return jax.tree.map(jnp.add, params, updates), state, value

        data = P("data")
        specs = {"in_specs": (P(), P(), data, data), "out_specs": P()}
        return jax.jit(jax.shard_map(step, mesh=mesh, **specs))

    return make


@pytest.mark.parametrize("how", ["traced", "told", "shard_map"])
def test_a_nan_in_the_examples_of_one_device_is_a_failure_on_all(how):
    mesh = net.mesh_of(8)
    steps = {"traced": net.traced, "told": net.told, "shard_map": inside_shard_map(mesh)}
    params, state = run(steps[how], mesh, lambda batch, state: (spoiled(batch), state))
    assert int(state.failures) >= 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
    _, alone = run(steps["traced"], None, lambda batch, state: (spoiled(batch), state))
    assert int(state.failures) == int(alone.failures)
    assert int(state.root_age) == int(alone.root_age)


@pytest.mark.parametrize(("make_step", "name"), [(net.traced, "kernel0"), (net.told, "kernel3")])
def test_a_root_that_one_device_misses_stays_in_place_on_all(make_step, name):
    def broken(batch, state):
        factor = state.memory.rows.factor
        factor = factor | {name: factor[name].at[0, 0].set(jnp.inf)}
        rows = state.memory.rows._replace(factor=factor)
        kept.append(np.asarray(state.memory.rows.root[name]))
        return batch, state._replace(memory=state.memory._replace(rows=rows))

    kept = []
    at = BEFORE + AFTER - 1
    params, state = run(make_step, net.mesh_of(8), broken, at=at)
    assert int(state.failures) >= 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    np.testing.assert_array_equal(state.memory.rows.root[name], kept[0])
    # The others have roots of the last update's factors, as on one device.
    _, alone = run(net.traced, None, broken, at=at)
    assert int(state.failures) == int(alone.failures)
    for found, expected in zip(
        jax.tree.leaves(state.memory.cols.root),
        jax.tree.leaves(alone.memory.cols.root),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)
