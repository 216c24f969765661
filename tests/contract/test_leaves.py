"""What every transformation does with leaves that are boxed, or are no arrays of a layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import optalr
from optalr.adapters import nnx as nnx_adapter
from tests.contract import problem
from tests.contract.registry import METHODS

every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


# 1. Boxes, which hold a parameter and the names of its axes.

BOXES = {
    "hidden": {
        "kernel": functools.partial(nn.LogicallyPartitioned, names=("in", "mlp")),
        "bias": functools.partial(nn.Partitioned, names=("mlp",)),
    },
    "output": {
        "kernel": functools.partial(nn.LogicallyPartitioned, names=("mlp", "out")),
        "bias": lambda value: value,
    },
}


def boxed(params):
    return jax.tree.map(lambda box, leaf: box(leaf), BOXES, params)


def boxes_in(tree):
    def is_box(node):
        return isinstance(node, nn.meta.AxisMetadata)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_box) if is_box(node)]


@functools.cache
def supplied():
    """One compiled evaluation for all methods, of parameters in boxes or out of them."""
    loss = optalr.composite_loss(
        lambda params, *batch: problem.predict(nn.unbox(params), *batch), problem.output_loss
    )
    return jax.jit(optalr.value_grad_and_extras(loss))


def train(tx, params, num_steps=3):
    batch, state = problem.make_batch(), tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(num_steps):
        value, grads, extras = supplied()(params, *batch)
        extras |= {"validation_value": value, "validation_value_fn": extras["value_fn"]}
        updates, state = update(grads, state, params, **extras)
        params = optax.apply_updates(params, updates)
    return params, state


@every_method
def test_boxes_change_no_number_and_hold_only_arrays_of_their_parameters_shape(method):
    tx, params = method.make(), problem.make_params()
    new, state = train(tx, boxed(params))
    assert jax.tree.structure(new) == jax.tree.structure(boxed(params))
    expected, plain_state = train(tx, params)
    for got, wanted in ((new, expected), (state, plain_state)):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    shapes = {box.names: box.value.shape for box in boxes_in(new)}
    for some_state in (tx.init(boxed(params)), state):
        assert all(box.value.shape == shapes[box.names] for box in boxes_in(some_state))


def test_a_factor_has_no_axis_names_and_a_second_moment_has_its_parameters():
    state = optalr.scale_by_kronecker().init(boxed(problem.make_params()))
    specs = nn.get_partition_spec(state.memory)
    assert specs.rows.factor["output"]["kernel"] == jax.P()
    assert specs.cols.root["hidden"]["kernel"] == jax.P()
    assert specs.second_moment["hidden"]["bias"] == jax.P("mlp")
    assert isinstance(state.memory.second_moment["hidden"]["kernel"], optax.MaskedNode)
    params = boxed(problem.make_params())
    _, state = train(optalr.scale_by_kronecker(), params, 1)
    factors = optalr.factor_spectra(state, params)
    assert set(factors) == {"['hidden']['kernel']", "['output']['kernel']"}


@pytest.mark.parametrize("with_layout", [False, True])
def test_boxes_go_with_a_layout_and_with_masks(with_layout):
    params = boxed(problem.make_params())
    loss = lambda p, *b: problem.output_loss(problem.predict(nn.unbox(p), *b), *b)  # noqa: E731
    layout = optalr.coverage(loss, params, *problem.make_batch()) if with_layout else None
    options = optalr.KroneckerOptions(min_batches=1, joint_bias=with_layout)
    tx = optalr.scale_by_kronecker(layout=layout, options=options)
    labels = {"hidden": "layers", "output": "rest"}
    tx = optax.partition({"layers": tx, "rest": optax.sgd(0.1)}, labels)
    new, _ = train(tx, params)
    assert np.any(new["hidden"]["kernel"].value != params["hidden"]["kernel"].value)


# Variables of nnx are boxes as well; ``nnx.Optimizer`` gives them to ``init`` alone.


class Net(nnx.Module):
    def __init__(self, rngs):
        named = functools.partial(nnx.with_metadata, eager_sharding=False)
        init = nnx.initializers.lecun_normal()
        bias = named(nnx.initializers.zeros, out_sharding=("mlp",))
        kernel = named(init, out_sharding=("in", "mlp"))
        self.hidden = nnx.Linear(3, 4, rngs=rngs, kernel_init=kernel, bias_init=bias)
        self.output = nnx.Linear(
            4, 3, rngs=rngs, kernel_init=named(init, out_sharding=("mlp", "out"))
        )

    def __call__(self, x):
        return self.output(jnp.tanh(self.hidden(x)))


def nnx_loss(net, inputs, labels):
    return problem.output_loss(net(inputs), inputs, labels)


NNX_METHODS = {
    "kronecker": lambda layout: optalr.scale_by_kronecker(
        layout=layout, options={"min_batches": 1, "warmup": 0}
    ),
    "measured": lambda layout: optalr.scale_by_kronecker(
        layout=layout, options={"spectrum": "measured", "min_batches": 1}
    ),
    "tso_alra": lambda layout: optalr.tso_alra(1e-2, layout=layout),
    "block_diagonal": lambda layout: optalr.scale_by_block_diagonal(),
    "window": lambda layout: optalr.scale_by_full_matrix(window=3),
    "swats": lambda layout: optalr.swats(1e-2),
}


@pytest.mark.parametrize("with_layout", [False, True])
@pytest.mark.parametrize("name", NNX_METHODS)
def test_the_state_of_an_nnx_optimizer_has_sharding_only_in_its_parameters_shape(name, with_layout):
    net, batch = Net(nnx.Rngs(0)), problem.make_batch()
    graphdef, params = nnx.split(net, nnx.Param)
    shapes = {
        variable.get_metadata().get("out_sharding"): variable.shape
        for _, variable in nnx.to_flat_state(params)
    }
    pure_loss = lambda p, *b: nnx_loss(nnx.merge(graphdef, p), *b)  # noqa: E731
    layout = optalr.coverage(pure_loss, nnx.as_pure(params), *batch) if with_layout else None
    tx = NNX_METHODS[name](layout)
    optimizer = nnx_adapter.Optimizer(net, tx, wrt=nnx.Param)
    evaluate = nnx_adapter.value_grad_and_extras(nnx_loss)
    before = nnx_loss(net, *batch)

    @nnx.jit
    def step(net, optimizer):
        _, grads, extras = evaluate(net, *batch)
        optimizer.update(net, jax.tree.map(lambda g: 0.1 * g, grads), **extras)

    def variables():
        return jax.tree.leaves(
            optimizer.opt_state, is_leaf=lambda node: isinstance(node, nnx.Variable)
        )

    for _ in range(2):
        for variable in variables():
            named = variable.get_metadata().get("out_sharding")
            assert named is None or variable.shape == shapes[named]
        step(net, optimizer)
    assert nnx_loss(net, *batch) != before


# 2. Leaves that are no layers.

ODD = {"float": 1.5, "none": None, "empty": jnp.zeros((0, 3)), "numpy": np.ones(2), "list": []}
INTEGERS = {"int": 2, "array": jnp.arange(3), "bool": True}


@every_method
def test_what_adam_and_grad_accept_is_accepted(method):
    params = {**problem.make_params(), "odd": ODD}
    tx, batch = method.make(), problem.make_batch()
    state = tx.init(params)
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)

    def step(state):  # the parameters stay Python numbers, as they do outside of jit
        _, grads, extras = problem.evaluate(params, batch)
        grads = {**grads, "odd": {**grads["odd"], "float": 0.5}}
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    new, after = jax.eval_shape(step, state)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@every_method
def test_integers_are_accepted_where_adam_accepts_them(method):
    params = {**problem.make_params(), "odd": INTEGERS}
    tx = method.make()
    state = tx.init(params)
    if method.needs:  # evaluate refuses integers, as jax.grad does
        return
    updates, _ = jax.eval_shape(lambda s: tx.update(params, s, params), state)
    new = jax.eval_shape(lambda u: optax.apply_updates(params, u), updates)
    wanted = jax.eval_shape(lambda p: jax.tree.map(jnp.asarray, p), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )


@every_method
def test_random_keys_are_refused_at_init_by_name(method):
    params = {**problem.make_params(), "odd": {"key": jax.random.key(0)}}
    tx, message = method.make(), r"params must be a pytree of floating.*\['odd'\]\['key'\] is key"
    with pytest.raises(TypeError, match=message):
        tx.init(params)
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(tx.init, params)


@every_method
def test_trees_without_leaves_are_accepted(method):
    tx = method.make()
    state = tx.init({"none": None})
    if not method.needs:
        updates, _ = tx.update({"none": None}, state, {"none": None}, value=jnp.float32(1))
        assert updates == {"none": None}


@pytest.mark.parametrize("leaf", [2, True, jnp.arange(2), jax.random.key(0), "text", len])
def test_evaluate_refuses_what_grad_refuses(leaf):
    params = {**problem.make_params(), "odd": leaf}
    with pytest.raises(TypeError, match=r"params must be a pytree of floating.*\['odd'\] is"):
        problem.evaluate(params, problem.make_batch())


def test_a_gradient_of_an_integer_is_refused_by_name():
    params = {"w": jnp.ones(2), "count": jnp.arange(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    tx = optalr.scale_by_local_gains()
    with pytest.raises(TypeError, match=r"updates must be .*\['count'\] is .*float0"):
        tx.update(grads, tx.init(params), params)


# 3. Wrappers that change the tree.


@pytest.mark.parametrize(
    "make",
    [
        lambda: optalr.tso_alra(1e-2),
        optalr.scale_by_kronecker,
        lambda: optalr.scale_by_kronecker(statistics="gradient"),
        optalr.scale_by_krylov_flow,
        lambda: optalr.scale_by_learned_rate(0.1),
        lambda: optalr.add_learned_decay(0.1),
    ],
)
@pytest.mark.parametrize("point", ["point", None])
def test_what_fits_no_leaf_is_refused_while_tracing(make, point):
    params = problem.make_params()
    _, grads, extras = problem.evaluate(params, problem.make_batch())
    tx = optax.flatten(make())
    if point is None:
        del extras["point"]
        if not optalr.wants_signals(tx.init(params)):
            return  # then nothing tells of the parameters' own tree
    with pytest.raises(ValueError, match="flatten"):
        jax.eval_shape(lambda s: tx.update(grads, s, params, **extras), tx.init(params))


def test_one_matrix_that_is_flattened_is_refused_too():
    params = jnp.ones((3, 3))
    evaluate = optalr.value_grad_and_extras(lambda w, x: jnp.mean((x @ w) ** 2))
    _, grads, extras = evaluate(params, jnp.ones((4, 3)))
    tx = optax.flatten(optalr.scale_by_kronecker())
    with pytest.raises(ValueError, match=r"leaf updates of shape \(9,\).*\(3, 3\).*optax.flatten"):
        tx.update(grads, tx.init(params), params, **extras)


@pytest.mark.parametrize("has_point", [True, False])
def test_a_group_without_any_layer_is_legal(has_point):
    params, batch = problem.make_params(), problem.make_batch()
    labels = jax.tree.map(lambda leaf: "biases" if leaf.ndim == 1 else "kernels", params)
    options = optalr.KroneckerOptions(min_batches=1)
    biases, kernels = (optalr.scale_by_kronecker(options=options) for _ in range(2))
    _, grads, extras = problem.evaluate(params, batch)
    if not has_point:
        del extras["point"]
    for tx in (
        optax.partition({"biases": biases, "kernels": kernels}, labels),
        optax.masked(biases, jax.tree.map(lambda label: label == "biases", labels)),
    ):
        state = tx.init(params)
        updates, _ = jax.eval_shape(lambda s, tx=tx: tx.update(grads, s, params, **extras), state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


# 4. Mapping over the parts of a state that have the parameters' structure.

SPECTRA = {
    name: optalr.scale_by_kronecker(options={"spectrum": name, "root_method": root_method})
    for name, root_method in (("factored", "eigenbasis"), ("exact", "auto"), ("measured", "auto"))
}
STATEFUL = {method.name: method.make for method in METHODS} | {
    name: lambda tx=tx: tx for name, tx in SPECTRA.items()
}


@pytest.mark.parametrize("name", STATEFUL)
def test_optax_maps_over_the_trees_of_a_state(name):
    tx, params = STATEFUL[name](), problem.make_params()
    state = jax.eval_shape(tx.init, params)
    assert optax.tree.map_params(tx, lambda leaf: leaf, state) == state
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path, params)
    named = jax.tree.map(lambda _, path: jax.tree_util.keystr(path), params, paths)
    mapped = optax.tree.map_params(
        tx,
        lambda leaf, path: leaf if isinstance(leaf, optax.MaskedNode) else path,
        state,
        named,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for way, leaf in jax.tree_util.tree_leaves_with_path(mapped):
        if isinstance(leaf, str):  # each leaf met the parameter that it belongs to
            assert jax.tree_util.keystr(way).endswith(leaf)
