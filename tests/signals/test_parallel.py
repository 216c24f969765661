"""Moments of a batch do not depend on how many devices share it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optalr
from tests.signals.reference import standard_normal

NUM_DEVICES = 8


def loss_fn(params, x, y):
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.tanh(h + params["bias"][None, None, None, :]).reshape(x.shape[0], -1)
    logits = jax.nn.log_softmax(h @ params["out"])
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "conv": standard_normal(keys[0], 3, 3, 2, 4) * 0.3,
        "bias": jnp.full(4, 0.1),
        "out": standard_normal(keys[1], 64, 3) * 0.2,
    }
    return params, standard_normal(keys[2], 16, 4, 4, 2), jnp.arange(16) % 3


@pytest.fixture(scope="module")
def whole(problem):
    """Return the compiled evaluation on one device, and its value, gradient and signals."""
    evaluate = jax.jit(optalr.value_grad_and_extras(loss_fn))
    value, grads, extras = evaluate(*problem)
    return evaluate, (value, grads, extras["signals"])


@pytest.fixture
def mesh():
    if jax.device_count() < NUM_DEVICES:
        pytest.skip("needs eight devices")
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(1e-3, np.abs(b).max()))

    jax.tree.map(close, actual, expected)


def test_sharded_batch_under_jit(problem, mesh, whole):
    params, x, y = problem
    evaluate, expected = whole
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded = evaluate(params, jax.device_put(x, sharding), jax.device_put(y, sharding))
    assert_same((sharded[0], sharded[1], sharded[2]["signals"]), expected)


@pytest.mark.parametrize("traced", [False, True], ids=["always", "traced flag"])
def test_shard_map_with_a_loss_local_to_each_device(problem, mesh, whole, traced):
    params, x, y = problem
    evaluate = optalr.value_grad_and_extras(loss_fn, axis_name="data")

    def local(params, x, y, flag):
        value, grads, extras = evaluate(params, x, y, signals=flag if traced else True)
        return value, grads, extras["signals"]

    split = PartitionSpec("data")
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), split, split, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    run = jax.jit(mapped)
    assert_same(run(params, x, y, True), whole[1])
    if traced:
        off = run(params, x, y, False)[2]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(off))


def test_shard_map_with_a_loss_that_averages_over_devices(problem, mesh, whole):
    params, x, y = problem

    def averaged(params, x, y):
        return jax.lax.pmean(loss_fn(params, x, y), "data")

    evaluate = optalr.value_grad_and_extras(averaged, axis_name="data")

    def local(params, x, y):
        value, grads, extras = evaluate(params, x, y)
        return value, grads, extras["signals"]

    split = PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=PartitionSpec()
    )
    assert_same(jax.jit(mapped)(params, x, y), whole[1])


def test_shard_map_inside_the_loss(problem, mesh, whole):
    params, x, y = problem
    split = PartitionSpec("data")

    def outer(params, x, y):
        def local(params, x, y):
            return jax.lax.pmean(loss_fn(params, x, y), "data")

        return jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=PartitionSpec()
        )(params, x, y)

    inside = jax.jit(optalr.value_grad_and_extras(outer))(params, x, y)
    assert_same((inside[0], inside[1], inside[2]["signals"]), whole[1])


def test_an_axis_over_which_nothing_varies_is_refused(problem):
    params, x, y = problem
    evaluate = optalr.value_grad_and_extras(loss_fn, axis_name="data")
    with pytest.raises(ValueError, match=r"axis_name='data'.*check_vma"):
        evaluate(params, x, y)
