"""Roots shared out over a mesh: the same numbers, a share of the work, one collective a refresh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from optalr.sharding.solving import solve_over
from optalr.sharding.spread import spread_over
from tests.sharding.counting import collectives, refresh_flops
from tests.sharding.net import loss_fn, make_batch, make_params, mesh_of, placed, told, traced

# What is solved: the stacks of several sizes, of which some have fewer matrices than devices.


def requests(with_last):
    stacks = {5: (1, 4, 2), 3: (6, 1), 4: (1, 1), 8: (3, 2)}
    keys = iter(jax.random.split(jax.random.key(0), 20))
    return [
        (
            jax.random.normal(next(keys), (k, n, n)),
            jnp.arange(1.0, k + 1),
            jnp.full((k, n), 2.0) if with_last else None,
        )
        for n, numbers in stacks.items()
        for k in numbers
    ]


def solve(kinds):
    def of_kind(matrices, dampings, last):
        found = matrices @ matrices + dampings[:, None, None]
        first = found[:, :, 0] if last is None else found[:, :, 0] * last
        return {"found": found, "first": first, "good": dampings > 2}

    return [of_kind(*kind) for kind in kinds]


@pytest.mark.parametrize(
    ("axes", "mesh_axes", "with_last", "rests"),
    [
        ("auto", None, True, False),
        ("auto", None, False, True),
        ("explicit", "model", False, False),
        ("explicit", "data", True, True),
        ("auto", ("model", "data"), True, True),
    ],
)
def test_every_request_is_answered_whoever_solves_it(axes, mesh_axes, with_last, rests):
    spread = spread_over(mesh_of(4, 2, axes=axes), mesh_axes, rests=rests)
    given = requests(with_last)
    shared = jax.jit(lambda parts: solve_over(spread, solve, parts))(given)
    alone = solve_over(None, solve, given)
    assert jax.tree.structure(shared) == jax.tree.structure(alone)
    for one, other in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_fewer_matrices_than_devices_are_dealt_out_before_they_are_gathered():
    spread, given = spread_over(mesh_of(8), None), requests(with_last=True)[:1]
    shared = jax.jit(lambda parts: solve_over(spread, solve, parts))
    for one, other in zip(
        jax.tree.leaves(shared(given)), jax.tree.leaves(solve_over(None, solve, given)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    text = shared.lower(given).compile().as_text()
    assert collectives(text) == {"all-to-all": 1, "all-gather": 1}
    # One matrix of 5 x 5, its first column and whether it is good, in eighths.
    assert re.search(r"f32\[1,8,4\]\S* all-gather", text)


def test_a_mesh_that_is_not_the_one_of_set_mesh_is_refused():
    spread = spread_over(mesh_of(4, 2), None)
    with (
        jax.set_mesh(mesh_of(8)),
        pytest.raises(ValueError, match=r"mesh must be the one of jax\.set_mesh"),
    ):
        solve_over(spread, solve, requests(with_last=False))


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        optalr.scale_by_kronecker(mesh=8)
    with pytest.raises(TypeError, match=r"static_args=\('mesh',\)"):
        optalr.untuned(10, mesh=8)
    for axes in (("rows",), ["data", "data"], ()):
        with pytest.raises(ValueError, match="mesh_axes must be axes of the mesh"):
            optalr.tso_alra(0.1, mesh=mesh_of(8), options={"mesh_axes": axes})
    with pytest.raises(TypeError, match="mesh_axes must be names"):
        optalr.tso_alra(0.1, mesh=mesh_of(8), options={"mesh_axes": 5})
    with pytest.raises(ValueError, match="sharded_factors=True needs a mesh"):
        optalr.tso_alra(0.1, options={"sharded_factors": True})
    with pytest.raises(ValueError, match=r"mesh_axes=.* are axes of a mesh"):
        optalr.untuned(10, options={"mesh_axes": "data"})


# Training: the traced step and train_step.

OPTIONS = {
    "eigh": {},
    "eigenbasis": {"root_method": "eigenbasis"},
    "measured": {"spectrum": "measured", "root_method": "eigenbasis"},
    "blocks": {"block_size": 4, "spectrum": "exact"},
}


def make_tx(mesh=None, options="eigh"):
    options = {"min_batches": 2, **OPTIONS[options]}
    return optalr.tso_alra(1e-2, update_every=3, damping=1e-2, mesh=mesh, options=options)


def train(make_step, tx, mesh=None, num_steps=8):
    params, step = placed(make_params(), mesh, P()), make_step(tx)
    state = tx.init(params)
    for seed in range(num_steps):
        batch = placed(make_batch(seed), mesh, P("data"))
        params, state, _ = step(params, state, *batch)
    assert int(optalr.metrics(state)["failures"]) == 0
    return jax.tree.map(np.asarray, params)


@functools.cache
def alone(options):
    return train(traced, make_tx(options=options))


@pytest.mark.parametrize(
    ("make_step", "axes", "options"),
    [
        (traced, "explicit", "eigh"),
        (told, "explicit", "eigh"),
        *((traced, "auto", name) for name in ("eigenbasis", "measured", "blocks")),
    ],
)
@pytest.mark.slow
def test_shared_roots_are_those_of_one_device(make_step, axes, options):
    mesh = mesh_of(4, 2, axes=axes)
    with jax.set_mesh(mesh):
        ended = train(make_step, make_tx(mesh, options), mesh)
    for name, leaf in alone(options).items():
        np.testing.assert_allclose(ended[name], leaf, rtol=1e-4, atol=1e-5)


# What it costs.


def mlp(width=64):
    """Sixteen equal layers."""
    return {f"kernel{i}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(16)}


def gpt(width=768):
    """The kernels of twelve blocks of attention and a net of four times the width."""
    shapes = {
        "attention": (width, 3 * width),
        "projection": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {
        f"{name}{block}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for block in range(12)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "params", [mlp(), pytest.param(gpt(), marks=pytest.mark.slow)], ids=["mlp", "gpt"]
)
def test_a_device_has_less_than_a_sixth_of_a_refresh(params):
    tx = functools.partial(optalr.scale_by_kronecker, statistics="gradient")
    alone = refresh_flops(tx(), params)
    assert alone > 0
    assert refresh_flops(tx(mesh=mesh_of(8)), params) <= alone / 6


def test_the_refreshing_program_alone_is_written_with_a_collective():
    tx, params = make_tx(mesh_of(8)), make_params()
    step, state = optalr.train_step(loss_fn, tx), tx.init(params)
    counts = {
        kind: step.lower(params, state, *make_batch(0), kind=kind).as_text().count('all_gather"')
        for kind in ("plain", "refreshing")
    }
    assert counts == {"plain": 0, "refreshing": 1}


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_the_refreshing_program_alone_gathers_roots(axes):
    mesh = mesh_of(8, axes=axes)
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def shapes(tree, sharding):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    params, batch = shapes(make_params(), everywhere), shapes(make_batch(0), split)

    def found(mesh_given, kind):
        tx = make_tx(mesh_given)
        state = shapes(jax.eval_shape(tx.init, params), everywhere)
        step = optalr.train_step(loss_fn, tx)
        with jax.set_mesh(mesh):
            return collectives(step.lower(params, state, *batch, kind=kind).compile().as_text())

    for kind in ("plain", "measuring"):
        assert found(mesh, kind) == found(None, kind)
        assert not found(mesh, kind)["all-gather"]
    refreshing = found(mesh, "refreshing")
    assert refreshing - found(None, "refreshing") == {"all-gather": 1}
