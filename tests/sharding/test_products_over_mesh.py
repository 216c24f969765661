"""Products of resting roots, each made by the device that owns its kernel."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.contract import sharded_net
from tests.contract.test_sharded_parameters import TOLERANCE, WAYS, alone, complete
from tests.sharding.counting import collectives, flops, result_bytes
from tests.sharding.net import mesh_of
from tests.sharding.test_roots_over_mesh import gpt, mlp

DEVICES = 8
IN_PARTS = {"sharded_factors": True}


# The same numbers, whatever a leaf is and however it lies.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "axes"),
    [
        ("FSDP, rows", "explicit"),
        ("data and model", "auto"),
        ("stacked layers", "auto"),
    ],
)
def test_each_way_to_shard_changes_no_number_of_factors_in_parts(way, axes):
    """With scanned layers, experts and biases, over thirty steps."""
    shape, batch, specs = WAYS[way]
    mesh = sharded_net.mesh_of(shape, axes)
    tx = complete(mesh, sharded_factors=True)
    found, state = sharded_net.train_sharded(tx, mesh, specs, 30, batch=batch)
    sharded_net.assert_close(found, alone(30)[0], TOLERANCE)
    assert int(optalr.metrics(state)["failures"]) == 0


# Rows that eight devices divide, columns alone, and neither; a side without a root, and none.
SHAPES = {"both": (16, 24), "cols": (6, 8), "neither": (5, 7), "long": (16, 40), "row": (9,)}


def make_grads(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def updates_of(tx, wrap):
    """Return the fourth update, the second by roots."""
    update, state = wrap(tx.update), tx.init(make_grads(0))
    for seed in range(4):
        updates, state = update(make_grads(seed), state)
    return updates


OPTIONS = {
    "factored": {"max_factor_size": 32},
    "exact": {"spectrum": "exact", "max_factor_size": 32},
    "measured": {"spectrum": "measured"},
    "blocks": {"block_size": 5, "root_dtype": "bfloat16"},  # with padding
}


def make_tx(mesh=None, **options):
    # Three gradients leave every factor with full rank: no eigenvectors of zero are arbitrary.
    options |= {"warmup": 0, "min_batches": 3, "sharded_factors": mesh is not None}
    numbers = {"update_every": 2, "damping": 1e-2}
    return optalr.scale_by_kronecker(statistics="gradient", mesh=mesh, options=options, **numbers)


def assert_close(found, expected):
    for name, leaf in expected.items():
        assert leaf.dtype == jnp.float64
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-9 * scale, err_msg=name)


# In float64: it tells a wrong number from eigenvectors that rounding turned.
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_form_of_a_leaf_gets_its_update(name):
    shared = updates_of(make_tx(mesh_of(DEVICES), **OPTIONS[name]), wrap=jax.jit)
    assert_close(shared, updates_of(make_tx(**OPTIONS[name]), wrap=jax.jit))


def vmapped(update):
    def one(grads, state):
        add = functools.partial(jax.tree.map, lambda leaf: leaf[None])
        found = jax.vmap(update)(add(grads), add(state))
        return jax.tree.map(lambda leaf: leaf[0], found)

    return jax.jit(one)


def scanned(update):
    def one(grads, state):
        def body(carry, _):
            return update(grads, carry)[::-1]

        state, updates = jax.lax.scan(body, state, length=1)
        return jax.tree.map(lambda leaf: leaf[0], updates), state

    return jax.jit(one)


def mapped(update):
    """Inside a ``shard_map`` each device makes all products."""
    maps = {"in_specs": P(), "out_specs": P(), "check_vma": False}
    return jax.jit(jax.shard_map(update, mesh=mesh_of(DEVICES), **maps))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", [vmapped, scanned, mapped])
def test_products_are_shared_out_under_every_transformation(wrap):
    shared = updates_of(make_tx(mesh_of(DEVICES)), wrap=wrap)
    assert_close(shared, updates_of(make_tx(), wrap=jax.jit))


# What it costs.


def lowered(params, spec):
    """Return the lowered program of a plain update whose gradients and parameters lie so."""
    mesh, place = mesh_of(DEVICES), NamedSharding(mesh_of(DEVICES), spec)
    tx = optalr.scale_by_kronecker(statistics="gradient", mesh=mesh, options=IN_PARTS)
    places = dict.fromkeys(params, place)
    shardings = optalr.state_shardings(tx, params, mesh, param_shardings=places)

    def shapes(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    def update(grads, state, params):
        return tx.update(grads, state._replace(told=np.int8(0)), params)

    params = shapes(params, places)
    state = shapes(jax.eval_shape(tx.init, params), shardings)
    return jax.jit(update, out_shardings=(places, shardings)).lower(params, state, params)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(), P("data")], ids=["replicated", "FSDP"])
def test_a_plain_step_receives_a_share_of_roots_and_updates(spec):
    shapes = [(64, 32), (32, 128), (128, 96), (96, 64)] * 4  # no kernel is square
    params = {f"w{i}": jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(shapes)}
    text = lowered(params, spec).compile().as_text()
    size = 4 * sum(math.prod(shape) for shape in shapes)
    roots = 4 * sum(m**2 + n**2 for m, n in shapes)
    found = result_bytes(text)
    # Rows of gradients and roots to their owners, rows of updates back. The longest first are not
    # quite the largest first.
    assert collectives(text)["all-to-all"] == 2
    assert found["all-to-all"] <= 1.25 * (2 * size + roots) / DEVICES
    # Gathered are the updates of replicated parameters, and nothing that is square.
    assert found["all-gather"] == (size if spec == P() else 0)
    assert not any(f"f32[{n},{n}]" in line for line in gathers(text) for n in (32, 64, 96, 128))
    assert found["all-reduce"] <= 64 * len(params)  # norms


def gathers(text):
    return [line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]


@pytest.mark.parametrize(
    ("params", "share"),
    # Of each kind the dearest branch counts, which no device has of all kinds together.
    [(mlp(), 1 / 8), pytest.param(gpt(), 1 / 5, marks=pytest.mark.slow)],
    ids=["mlp", "gpt"],
)
def test_a_device_makes_its_share_of_the_products(params, share):
    def of(tx):
        def run(grads, state):
            return tx.update(grads, state._replace(told=np.int8(0)), grads)

        return flops(jax.make_jaxpr(run)(params, jax.eval_shape(tx.init, params)).jaxpr)

    make = functools.partial(optalr.scale_by_kronecker, statistics="gradient")
    alone, whole = of(make()), of(make(mesh=mesh_of(DEVICES)))
    assert alone == whole > 0
    assert of(make(mesh=mesh_of(DEVICES), options=IN_PARTS)) <= share * alone
