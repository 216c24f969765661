"""Parameters sharded in every way that people use change no number.

Each way is tried with the complete optimizer, whose roots are shared out besides. Every method that
reads signals is tried with one way that has something of all. All of it on axes that are explicit
and on axes that are left to the compiler; the whole runs take thirty steps.
"""

import functools

import jax
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optalr
from tests.contract import sharded_net as net
from tests.contract.registry import METHODS

TOLERANCE, NUM_STEPS, FEW = 1e-5, 30, 6

DATA, MODEL = {"data": 8}, {"model": 8}
BOTH = {"data": 4, "model": 2}
# For each way: the mesh, the batch, and the parameters that are not replicated.
WAYS = {
    "data parallel": (DATA, P("data"), {}),
    "FSDP, rows": (
        DATA,
        P("data"),
        {"up": P("data"), "down": P("data"), "layers": P(None, "data"), "experts": P(None, "data")},
    ),
    "FSDP, columns": (
        DATA,
        P("data"),
        {
            "up": P(None, "data"),
            "bias": P("data"),
            "layers": P(None, None, "data"),
            "experts": P(None, None, "data"),
        },
    ),
    "tensor parallel": (
        MODEL,
        P(),
        {"up": P(None, "model"), "bias": P("model"), "down": P("model")},
    ),
    "data and model": (
        BOTH,
        P("data"),
        {
            "up": P("data", "model"),
            "bias": P("model"),
            "down": P("model", "data"),
            "layers": P(None, "data", "model"),
            "experts": P("model", "data"),
        },
    ),
    "stacked layers": (BOTH, P("data"), {"layers": P("model")}),
    "experts": (BOTH, P("data"), {"experts": P("model")}),
}
# What a layer's moments serve, and the head's alone.
READERS = [method for method in METHODS if {"signals", "head"} & set(method.needs)]


def complete(mesh=None, **options):
    return optalr.tso_alra(
        1e-2,
        update_every=5,
        momentum=0.5,
        damping=1e-2,
        layout=net.layout(),
        mesh=mesh,
        options={"min_batches": 2, **options},
    )


@functools.cache
def alone(num_steps):
    tx, params = complete(), net.make_params()
    return net.train(jax.jit(net.make_step(tx)), params, tx.init(params), num_steps)


def check(way, axes, num_steps):
    shape, batch, specs = WAYS[way]
    mesh = net.mesh_of(shape, axes)
    tx = complete(mesh)
    found, state = net.train_sharded(tx, mesh, specs, num_steps, batch=batch)
    expected, expected_state = alone(num_steps)
    net.assert_close(found, expected, TOLERANCE)
    numbers, wanted = optalr.metrics(state), optalr.metrics(expected_state)
    assert int(numbers["failures"]) == int(wanted["failures"]) == 0
    assert int(numbers["root_age"]) == int(wanted["root_age"])


@pytest.mark.slow
@pytest.mark.parametrize("axes", net.AXES)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_shard_changes_no_number(axes, way):
    check(way, axes, NUM_STEPS)


def descending(method):
    """Return a method that goes down: some are directions, and have no rate."""
    if "learning_rate" in method.reports:
        return method.make()
    return optax.chain(method.make(), optax.scale(-0.03))


@functools.cache
def alone_by(method):
    tx, params = descending(method), net.make_params(stacks=False)
    return net.train(jax.jit(net.make_step(tx)), params, tx.init(params), NUM_STEPS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("axes", net.AXES)
@pytest.mark.parametrize("method", READERS, ids=repr)
def test_every_method_that_reads_signals_trains_sharded_parameters(method, axes):
    shape, batch, specs = WAYS["data and model"]
    specs = {name: specs[name] for name in net.DENSE}
    mesh = net.mesh_of(shape, axes)
    found, _ = net.train_sharded(
        descending(method), mesh, specs, NUM_STEPS, batch=batch, stacks=False
    )
    net.assert_close(found, alone_by(method), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", READERS, ids=repr)
def test_every_method_that_reads_signals_trains_inside_shard_map(method):
    mesh, tx, params = net.mesh_of(DATA), descending(method), net.make_params(stacks=False)
    step = jax.shard_map(
        net.make_step(tx, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    found, _ = net.train(jax.jit(step), params, tx.init(params), NUM_STEPS)
    net.assert_close(found, alone_by(method), TOLERANCE)


@pytest.mark.slow
def test_roots_stay_on_each_device_inside_shard_map():
    mesh = net.mesh_of(DATA)
    tx, params = complete(mesh), net.make_params()
    step = jax.shard_map(
        net.make_step(tx, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    found, state = net.train(jax.jit(step), params, tx.init(params), FEW)
    net.assert_close(found, alone(FEW)[0], TOLERANCE)
    assert int(optalr.metrics(state)["failures"]) == 0
