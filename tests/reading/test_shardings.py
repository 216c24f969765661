"""How a state is sharded over a mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optalr
from tests.contract.registry import METHODS

# A square kernel has factors of its own shape.
SHAPES = {"square": (8, 8), "wide": (4, 16), "bias": (8,)}
SPECS = {"square": P("data", None), "wide": P(None, "model"), "bias": P("data")}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(axes="auto"):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AXES[axes],) * 2)


def params_on(mesh):
    return {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }


def shapes():
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def entries(spec):
    """Return the entries of a PartitionSpec, without those at the end that say nothing."""
    found = list(spec)
    while found and found[-1] is None:
        found.pop()
    return found


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_state_is_sharded_as_init_makes_it_of_sharded_parameters(method):
    """On explicit axes ``init`` itself says which arrays follow a parameter: those made like it."""
    tx, mesh = method.make(), mesh_of("explicit")
    with jax.set_mesh(mesh):
        params = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
            for (name, leaf), spec in zip(shapes().items(), SPECS.values(), strict=True)
        }
        made = jax.eval_shape(tx.init, params)
        told = optalr.state_shardings(tx, params, mesh)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    leaves, _ = jax.tree_util.tree_flatten_with_path(made)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(told), strict=True):
        found = entries(leaf.sharding.spec) if leaf.sharding else []
        assert entries(sharding.spec) == found, jax.tree_util.keystr(path)


@pytest.mark.parametrize("axes", list(AXES))
def test_a_state_is_made_where_it_shall_lie(axes):
    params = params_on(mesh_of(axes))
    tx = optax.chain(optalr.scale_by_kronecker(statistics="gradient"), optax.trace(0.9))
    shardings = optalr.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    memory, trace = state[0].memory, state[1].trace
    for name in ("square", "wide"):
        assert trace[name].sharding.spec == SPECS[name]
        assert memory.rows.factor[name].sharding.spec == P()
    assert memory.second_moment["bias"].sharding.spec == P("data")
    assert state[0].count.sharding.spec == P()
    _, after = jax.jit(tx.update, out_shardings=(None, shardings))(params, state, params)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert one.sharding == other.sharding


def test_nested_and_wrapped_states_and_parameters_of_any_tree():
    mesh = mesh_of()
    labels = {"square": "layers", "wide": "layers", "bias": "rest"}
    parts = optax.partition(
        {"layers": optalr.scale_by_kronecker(), "rest": optax.adam(0.1)}, labels
    )
    injected = optax.inject_hyperparams(lambda decay: optax.chain(parts, optax.trace(decay)))
    tx = optax.MultiSteps(injected(0.9), 2)
    told = optalr.state_shardings(tx, shapes(), mesh, param_shardings=SPECS)
    assert told.acc_grads["wide"].spec == SPECS["wide"]
    inner, trace = told.inner_opt_state.inner_state
    assert trace.trace["square"].spec == SPECS["square"]
    moments = inner.inner_states["rest"].inner_state[0]
    assert moments.mu["bias"].spec == SPECS["bias"]
    layers = inner.inner_states["layers"].inner_state
    assert layers.memory.rows.factor["square"].spec == P()


def test_one_sharding_may_stand_for_all_and_none_for_no_sharding():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    tx = optax.trace(0.9)
    told = optalr.state_shardings(tx, shapes(), mesh, param_shardings=P("data"))
    assert {sharding.spec for sharding in jax.tree.leaves(told)} == {P("data")}
    some = dict.fromkeys(SHAPES) | {"bias": NamedSharding(mesh, P("data"))}
    told = optalr.state_shardings(tx, shapes(), param_shardings=some)
    assert told.trace["square"].spec == P()
    assert told.trace["bias"].spec == P("data")
    bare = optalr.state_shardings(tx, jnp.ones((8, 8)), mesh, param_shardings=P(None, "model"))
    assert bare.trace.spec == P(None, "model")


def test_an_array_with_further_axes_in_front_follows_its_parameter():
    tx = optalr.scale_by_full_matrix(window=3)
    told = optalr.state_shardings(tx, shapes(), mesh_of(), param_shardings=SPECS)
    assert P(None, "data") in {s.spec for s in jax.tree.leaves(told)}


RULES = [("embed", None), ("mlp", "model"), ("heads", "model"), ("heads", "data")]


def test_names_of_linen_boxes_by_rules_of_their_own_or_of_the_mesh():
    params = {
        "logical": nn.LogicallyPartitioned(jnp.ones((8, 8)), names=("mlp", "heads")),
        "mesh": nn.Partitioned(jnp.ones((8, 8)), names=("data", None)),
        "plain": jnp.ones((4, 4)),
    }
    tx = optax.chain(optalr.scale_by_kronecker(), optax.scale_by_adam())
    told = optalr.state_shardings(tx, params, mesh_of(), rules=RULES)
    assert jax.tree.structure(told) == jax.tree.structure(tx.init(params))
    moments = told[1].mu
    assert moments["logical"].value.spec == P("model", "data")  # each axis of the mesh once
    assert moments["mesh"].value.spec == P("data", None)
    assert moments["plain"].spec == P()
    assert told[0].memory.cols.factor["logical"].spec == P()
    made = jax.jit(tx.init, out_shardings=told)(params)
    assert made[1].mu["logical"].value.sharding.spec == P("model", "data")


def test_names_of_nnx_variables():
    mesh = mesh_of()
    named = {"out_sharding": ("data", "mlp"), "eager_sharding": False}
    init = nnx.with_metadata(nnx.initializers.lecun_normal(), **named)
    with jax.set_mesh(mesh):
        net = nnx.Linear(8, 4, rngs=nnx.Rngs(0), kernel_init=init)
        params = nnx.state(net, nnx.Param)
        told = optalr.state_shardings(optax.trace(0.9), shapes_of(params), mesh, rules=RULES)
    specs = jax.tree.map(lambda sharding: sharding.spec, nnx.to_pure_dict(told.trace))
    assert specs == {"kernel": P("data", "model"), "bias": P()}


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_errors_say_what_is_wanted():
    tx = optax.trace(0.9)
    with pytest.raises(TypeError, match="mesh must be given"):
        optalr.state_shardings(tx, shapes())
    with pytest.raises(TypeError, match="param_shardings must hold a NamedSharding"):
        optalr.state_shardings(
            tx, shapes(), mesh_of(), param_shardings=dict.fromkeys(SHAPES, "data")
        )
    with pytest.raises(ValueError, match="param_shardings must have a leaf for each of 3"):
        optalr.state_shardings(tx, shapes(), mesh_of(), param_shardings={"square": P()})
    boxed = {"w": nn.LogicallyPartitioned(jnp.ones((8, 8)), names=("mlp", None))}
    with pytest.raises(ValueError, match="the axis 'mlp' of a parameter is no axis of the mesh"):
        optalr.state_shardings(tx, boxed, mesh_of())
