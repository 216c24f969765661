"""What a compiled step finds out about where arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from optalr.programs.placement import Carried
from tests.sharding import net

MESH = net.mesh_of(8)
OTHER = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
IN_PARTS = Carried(alone=False, in_parts=True)


def array(spec, mesh=MESH):
    return jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))


def batch_of(*arrays):
    found = IN_PARTS.with_data(arrays, arrays).batch
    return None if found is None else found.spec


HOST = np.ones((8, 8))
DATA, REST = P("data"), P()


@pytest.mark.parametrize(
    ("arrays", "spec"),
    [
        ((array(DATA), array(DATA)), DATA),
        ((array(DATA), array(REST), HOST, jnp.ones(8)), DATA),  # weights, a key
        ((array(P("data", None)), array(DATA)), DATA),
        ((array(P(("data", "model")), OTHER),), P(("data", "model"))),
        ((array(P("data", "model"), OTHER), array(DATA, OTHER)), DATA),
        ((array(P(None, "data")),), None),  # time first
        ((array(DATA, OTHER), array(P("model"), OTHER)), None),  # one is no batch
        ((array(DATA), array(DATA, OTHER)), None),
        ((array(DATA), array(P(None, "data"))), None),
        ((HOST, jnp.ones(8)), None),
        ((), None),
    ],
)
def test_examples_are_sharded_as_the_first_axis_of_all_sharded_arrays(arrays, spec):
    assert batch_of(*arrays) == spec


def test_a_batch_of_another_mesh_than_that_of_the_context_is_left_to_the_compiler():
    with jax.set_mesh(OTHER):
        assert batch_of(array(DATA)) is None
    with jax.set_mesh(MESH):
        assert batch_of(array(DATA)) == DATA


def test_factors_on_all_devices_ask_for_no_sharding_of_examples():
    params = {"w": array(REST)}
    for factors, in_parts in (([array(DATA)], True), ([array(REST)], False), ([], False)):
        carried = Carried.of(params, factors)
        assert carried == Carried(alone=False, in_parts=in_parts)
        assert (carried.with_data([], [array(DATA)]).batch is not None) == in_parts


def test_one_device_is_told_by_all_arrays():
    alone, split = {"w": jnp.ones(8), "v": HOST}, [array(DATA)]
    assert Carried.of(alone, []).with_data([HOST], ()).alone
    assert not Carried.of(alone, []).with_data(split, ()).alone
    assert not Carried.of({"w": array(REST)}, []).with_data([HOST], ()).alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [np.asarray, lambda a: jax.device_put(a, NamedSharding(MESH, REST))]
)
def test_a_state_that_was_restored_elsewhere_is_looked_at_again(place):
    """Its factors come to rest in parts in the first step."""
    tx = optalr.tso_alra(1e-2, mesh=MESH, options={"sharded_factors": True})
    params = jax.device_put(net.make_params((8, 16, 8)), NamedSharding(MESH, REST))
    state = jax.tree.map(place, tx.init(params))
    batch = [jax.device_put(np.ones((16, 8)), NamedSharding(MESH, DATA))] * 2
    step = optalr.train_step(net.loss_fn, tx)
    step(params, state, *batch)
    assert step._carried == IN_PARTS


@pytest.mark.slow
@pytest.mark.parametrize("axes", net.AXES)
@pytest.mark.parametrize("odd", ["nothing", "table", "time first", "odd batch"])
def test_what_is_found_changes_no_number(axes, odd):
    """Whatever else is sharded: a table among the arguments, another axis than the first."""
    mesh = net.mesh_of(8, axes=axes)
    split, everywhere = NamedSharding(mesh, DATA), NamedSharding(mesh, REST)
    time_first = odd == "time first"
    places = NamedSharding(mesh, P(None, "data")) if time_first else split
    keys = jax.random.split(jax.random.key(0))
    x, y = (np.asarray(jax.random.normal(key, (16, 3, 8))) for key in keys)

    def loss_fn(params, x, y, table):
        # Examples come second where time is first; the step is not told.
        turned = [a.swapaxes(0, 1) if time_first else a for a in (x, y)]
        return net.loss_fn(params, *turned) + 0 * jnp.sum(table)

    def train(tx, place, table, split):
        step, params = optalr.train_step(loss_fn, tx), place(net.make_params((8, 16, 8)))
        state = jax.jit(tx.init)(params)
        batch = [split(a.swapaxes(0, 1) if time_first else a) for a in (x, y)]
        for _ in range(6):
            params, state, loss = step(params, state, *batch, table)
        return jax.tree.map(np.asarray, params), loss

    alone, loss = train(optalr.tso_alra(1e-2), lambda a: a, HOST, lambda a: a)
    tx = optalr.tso_alra(1e-2, mesh=mesh, options={"sharded_factors": True})
    put = jax.device_put
    with jax.set_mesh(mesh):
        table = put(HOST, split if odd in ("table", "odd batch") else everywhere)
        # As the last batch of an epoch that the devices do not divide.
        place = (lambda a: put(a, everywhere)) if odd == "odd batch" else lambda a: put(a, places)
        found, sharded_loss = train(tx, lambda a: put(a, everywhere), table, place)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for name, leaf in alone.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-5 * np.abs(leaf).max())
