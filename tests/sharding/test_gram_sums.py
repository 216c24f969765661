"""Gram products of a batch over a mesh: each device receives its rows of the sums, and no whole."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.contract import sharded_net
from tests.contract.test_sharded_parameters import (
    NUM_STEPS,
    READERS,
    TOLERANCE,
    WAYS,
    alone,
    alone_by,
    complete,
    descending,
)
from tests.sharding import net
from tests.sharding.counting import COLLECTIVE, RESULT, collectives, result_bytes

DEVICES = 8
# No kernel is square, so that no gradient has the shape of a Gram matrix.
SIZES = (8, 16, 24, 32, 8)
PAIRS = list(itertools.pairwise(SIZES))
LAYOUTS = {"data parallel": P(), "FSDP": P("data")}


# What it costs.


def compiled(
    layout, kind, *, share=True, positions=(), axes="auto", sizes=SIZES, options=None, **capture
):
    """Return the text of one kind of step, with factors in parts."""
    mesh = net.mesh_of(DEVICES, axes=axes)
    split = NamedSharding(mesh, P("data"))
    tx = optalr.tso_alra(1e-2, mesh=mesh, options={"sharded_factors": True, **(options or {})})

    def shapes(tree, shardings):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    params = net.make_params(sizes)
    places = dict.fromkeys(params, NamedSharding(mesh, LAYOUTS[layout]))
    shardings = optalr.state_shardings(tx, params, mesh, param_shardings=places)
    state = shapes(jax.eval_shape(tx.init, params), shardings)
    batch = [
        jax.ShapeDtypeStruct((64, *positions, size), jnp.float32, sharding=split)
        for size in (sizes[0], sizes[-1])
    ]
    if not share:
        capture["batch_sharding"] = None  # else the step finds it
    step = optalr.train_step(net.loss_fn, tx, **capture)
    return step.lower(shapes(params, places), state, *batch, kind=kind).compile().as_text()


def shapes_in(text, kind):
    """Return the shapes of the results of collectives of a kind, without axes of one entry."""
    lines = [(line, COLLECTIVE.search(line)) for line in text.splitlines()]
    results = [line[: at.start()].split(" = ", 1)[1] for line, at in lines if at and at[1] == kind]
    shapes = [shape for result in results for _, shape in RESULT.findall(result) if shape]
    return [tuple(n for n in map(int, shape.split(",")) if n > 1) for shape in shapes]


# Sums of more rows than features are made in the backward pass, others where they are folded in.
@pytest.mark.slow
@pytest.mark.parametrize("positions", [(), (32,)], ids=["later", "backward"])
@pytest.mark.parametrize("kind", ["measuring", "traced"])
@pytest.mark.parametrize(
    ("layout", "axes"), [("data parallel", "auto"), ("FSDP", "auto"), ("data parallel", "explicit")]
)
def test_sums_are_reduce_scattered_and_no_whole_one_is_received(layout, axes, kind, positions):
    text = compiled(layout, kind, positions=positions, axes=axes)
    wanted = [(n // DEVICES, n) for pair in PAIRS for n in pair]
    wanted = sorted(tuple(n for n in shape if n > 1) for shape in wanted)
    assert sorted(shapes_in(text, "reduce-scatter")) == wanted
    whole = {(n, n) for n in SIZES}
    for collective in ("all-reduce", "all-gather"):
        assert not whole & set(shapes_in(text, collective))


@pytest.mark.slow
def test_without_the_sharding_of_the_batch_whole_sums_are_received():
    """What the other tests would not see if their ways of looking were wrong."""
    text = compiled("data parallel", "measuring", share=False)
    assert not collectives(text)["reduce-scatter"]
    assert {(n, n) for n in SIZES} <= set(shapes_in(text, "all-reduce"))


@pytest.mark.slow
def test_a_measurement_receives_a_share_of_what_it_did():
    """Beside the gradient an all-reduce of all sums; now their rows, which come from all others."""
    squares = 4 * sum(m * m + n * n for m, n in PAIRS)
    plain, whole, parts = (
        result_bytes(compiled("data parallel", kind, share=share))
        for kind, share in (("plain", True), ("measuring", False), ("measuring", True))
    )
    assert whole["all-reduce"] - plain["all-reduce"] >= squares
    assert parts["all-reduce"] - plain["all-reduce"] <= 0.02 * squares  # norms and flags
    assert parts["reduce-scatter"] == squares // DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["measuring", "traced"])
def test_of_blocks_each_device_receives_its_rows(kind):
    """A step that is told what is kept; else rows of whole sums come of a backward pass."""
    sizes, options = (8, 16, 48, 32, 8), {"block_size": 16}
    case = {"positions": (32,), "sizes": sizes, "options": options}
    blocks, whole = {(3, 2, 16), (2, 2, 16)}, {(6, 48), (4, 32)}
    told = {"storage": optalr.KroneckerOptions(**options)}
    for storage, wanted, other in ((told, blocks, whole), ({}, whole, blocks)):
        text = compiled("data parallel", kind, **case, **storage)
        received = set(shapes_in(text, "reduce-scatter"))
        assert wanted <= received
        assert not other & received
        assert not {(48, 48), (32, 32)} & set(shapes_in(text, "all-reduce"))


@pytest.mark.slow
def test_a_sample_is_drawn_by_each_device_of_its_own_examples():
    """The compiler alone gathers a sample's rows, and each device measures all of them."""
    largest = max(m * n for m, n in PAIRS)
    for share in (False, True):
        text = compiled("data parallel", "measuring", share=share, positions=(32,), every=3)
        rows = [s for s in shapes_in(text, "all-gather") if math.prod(s) > largest]
        assert bool(rows) != share


# The same numbers.


@pytest.mark.slow
@pytest.mark.parametrize("axes", net.AXES)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_shard_changes_no_number(way, axes):
    """With scanned layers, experts and biases, over thirty steps."""
    shape, batch, specs = WAYS[way]
    mesh = sharded_net.mesh_of(shape, axes)
    split = NamedSharding(mesh, batch if len(batch) else P("model"))
    found, state = sharded_net.train_sharded(
        complete(mesh, sharded_factors=True), mesh, specs, NUM_STEPS,
        batch=batch, batch_sharding=split,
    )  # fmt: skip
    sharded_net.assert_close(found, alone(NUM_STEPS)[0], TOLERANCE)
    assert int(optalr.metrics(state)["failures"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("axes", net.AXES)
@pytest.mark.parametrize("method", READERS, ids=repr)
def test_every_method_that_reads_signals_gets_the_same_numbers(method, axes):
    shape, batch, specs = WAYS["FSDP, rows"]
    mesh = sharded_net.mesh_of(shape, axes)
    split = NamedSharding(mesh, batch)
    specs = {name: specs[name] for name in specs if name in sharded_net.DENSE}
    found, _ = sharded_net.train_sharded(
        descending(method), mesh, specs, NUM_STEPS, batch=batch, stacks=False, batch_sharding=split
    )
    sharded_net.assert_close(found, alone_by(method), TOLERANCE)


def conv_loss(params, images, targets):
    numbers = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(
        images, params["conv"], (1, 1), "SAME", dimension_numbers=numbers
    )
    hidden = optalr.tap_layer(hidden, hidden, params["tapped"])
    return jnp.mean((jnp.tanh(hidden).mean((1, 2)) @ params["dense"].T - targets) ** 2)


def conv_problem(number):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"conv": (3, 3, 2, 8), "tapped": (8, 8), "dense": (5, 8)}
    params = {
        name: jax.random.normal(key, shape) / 4
        for key, (name, shape) in zip(keys[:3], shapes.items(), strict=True)
    }
    images = jax.random.normal(keys[3], (number, 6, 6, 2))
    return params, images, jnp.sin(images.sum((1, 2)) @ jnp.ones((2, 5)))


def grams(args, wrap=jax.jit, loss=conv_loss, **capture):
    evaluate = optalr.value_grad_and_extras(loss, **capture)
    return wrap(lambda *args: evaluate(*args)[2]["signals"])(*args)


def assert_same_moments(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


def stacked(function):
    """Under a vmap, over copies of everything."""

    def of_first(*args):
        copies = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), args)
        return jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(function))(*copies))

    return of_first


def inside(function):
    """Inside a ``shard_map``, where each device has the batch."""
    maps = {"in_specs": P(), "out_specs": P(), "check_vma": False}
    return jax.jit(jax.shard_map(function, mesh=net.mesh_of(DEVICES), **maps))


@pytest.mark.parametrize("wrap", [jax.jit, stacked, inside, lambda function: function])
@pytest.mark.parametrize("number", [16, 12], ids=["even", "odd"])
def test_convolutions_and_layers_by_hand_have_their_moments(wrap, number):
    """And under every transformation, with devices that do not divide the examples."""
    split, args = NamedSharding(net.mesh_of(DEVICES), P("data")), conv_problem(number)
    assert_same_moments(grams(args, wrap, batch_sharding=split), grams(args))


def linear_loss(params, inputs, targets):
    return jnp.mean(inputs @ params["w"] * targets)


def test_each_example_is_as_likely_as_every_other():
    """Each is a basis vector, so that the diagonal tells which were looked at."""
    split = NamedSharding(net.mesh_of(DEVICES), P("data"))
    args, inputs = {"w": jnp.ones((32, 4))}, jnp.eye(32)
    options = {"loss": linear_loss, "every": 2, "batch_sharding": split}
    measure = jax.jit(lambda targets: grams((args, inputs, targets), lambda f: f, **options)["w"])
    seen = np.zeros(32)
    for seed in range(100):
        moments = measure(jax.random.normal(jax.random.key(seed), (32, 4)))
        assert float(moments.samples) == 16
        seen += np.diag(moments.rows) * 32
    # Each is seen half of the time, and then counts twice; a mean of 100 has a deviation of 0.1.
    np.testing.assert_allclose(seen / 100, 1, atol=0.4)


def test_a_sharding_that_is_none_of_a_batch_is_refused():
    mesh = net.mesh_of(DEVICES)
    evaluate = functools.partial(optalr.value_grad_and_extras, net.loss_fn)
    with pytest.raises(TypeError, match="batch_sharding must be a NamedSharding"):
        evaluate(batch_sharding=mesh)
    for spec in (P(), P(None, "data")):
        with pytest.raises(ValueError, match="batch_sharding must shard the first axis"):
            evaluate(batch_sharding=NamedSharding(mesh, spec))
