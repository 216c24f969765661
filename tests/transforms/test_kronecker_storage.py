"""What the coverage report says is kept is what is kept; bases that are refreshed, not retaken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.signals.moments import LayerMoments

BARE = optalr.KroneckerOptions(warmup=0, min_batches=1, max_update=None)


def loss_fn(params, tokens):
    x = params["table"][tokens] * params["scale"][None, None, :]
    h = jnp.tanh(jnp.einsum("ntd,dhk->nthk", x, params["split"]))
    h = h.reshape(*tokens.shape, -1) @ params["w"] + params["b"][None, None]
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return jnp.mean(jnp.square(h))


PARAMS = {
    "table": jnp.ones((11, 4)),
    "scale": jnp.ones(4),
    "split": jnp.ones((4, 2, 6), jnp.bfloat16),
    "w": jnp.ones((12, 7)),
    "b": jnp.zeros(7),
    "stack": jnp.ones((3, 7, 7)),
}
TOKENS = jnp.zeros((2, 5), jnp.int32)


def kept_bytes(state):
    """Bytes a leaf, over all trees of the state that have the structure of the parameters."""
    total = dict.fromkeys((f"['{name}']" for name in PARAMS), 0)
    for part in (*state.memory.rows, *state.memory.cols, *state.memory[2:]):
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            total[jax.tree_util.keystr(path)] += leaf.size * leaf.dtype.itemsize
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_factor_size": 6},
        {"block_size": 5},
        {"block_size": 5, "max_factor_size": 3, "joint_bias": True},
        {"spectrum": "exact", "block_size": 5},
        {"spectrum": "measured", "max_factor_size": 6, "joint_bias": True},
        {"root_method": "eigenbasis", "max_factor_size": 7, "joint_bias": True},
        {"root_method": "eigenbasis", "spectrum": "exact"},
        {"root_dtype": "bfloat16", "max_factor_size": 7},
        {"root_dtype": jnp.bfloat16, "root_method": "eigenbasis", "block_size": 5},
        {"root_dtype": "bfloat16", "spectrum": "measured"},
    ],
    ids=str,
)
def test_the_bytes_of_the_report_are_those_of_the_state(options):
    options = optalr.KroneckerOptions(**options)
    report = optalr.coverage(loss_fn, PARAMS, TOKENS, options=options)
    tx = optalr.scale_by_kronecker(layout=report, options=options)
    state = jax.eval_shape(tx.init, PARAMS)
    assert {leaf.path: leaf.state_bytes for leaf in report.leaves} == kept_bytes(state)


def test_the_defaults_of_the_report_are_those_of_the_method():
    def wide(params, x):
        return jnp.mean(x @ params["w"])

    params = {"w": jax.ShapeDtypeStruct((5000, 2), jnp.float32)}
    report = optalr.coverage(wide, params, jax.ShapeDtypeStruct((3, 5000), jnp.float32))
    leaf = report["['w']"]
    assert leaf.reason == "rows keep a diagonal (5000 > max_factor_size=4096)"
    assert leaf.state_bytes == 2 * 4 * (5000 + 2 * 2)


def test_the_report_says_what_is_not_kept_whole():
    options = optalr.KroneckerOptions(block_size=5, joint_bias=True)
    report = optalr.coverage(loss_fn, PARAMS, TOKENS, options=options)
    assert report["['w']"].treatment == "kronecker"
    assert report["['w']"].reason.startswith("rows in 3 blocks of 5 (13 > block_size=5); cols in 2")
    assert report["['b']"].reason == "one more row of ['w']"
    notes = "cols in 3 blocks of 4 (12 > block_size=5)", "cols measured whole (pass storage= to"
    assert report["['split']"].reason.split("; ")[0] == notes[0]
    assert report["['split']"].reason.split("; ")[1].startswith(notes[1])
    report = optalr.coverage(loss_fn, PARAMS, TOKENS, options=options, storage=options)
    assert report["['split']"].reason == notes[0]


def drifting_problem():
    rng = np.random.default_rng(0)

    def gram(size):
        factor = rng.standard_normal((50 * size, size)) * np.geomspace(1, 0.1, size)
        return (factor.T @ factor / (50 * size)).astype(np.float32)

    def moments(rows, cols):
        mean = jnp.zeros(rows.shape[-1])
        return LayerMoments(
            jnp.asarray(rows), jnp.asarray(cols), mean, None, jnp.float32(16), jnp.float32(1)
        )

    grads = {"w": jnp.asarray(rng.standard_normal((12, 6)), jnp.float32)}
    batches = [{"w": moments(gram(12), gram(6))} for _ in range(6)]
    return grads, batches


@pytest.mark.parametrize("spectrum", ["factored", "exact", "measured"])
def test_roots_of_half_the_bytes_give_nearly_the_same_direction(spectrum):
    grads, batches = drifting_problem()

    def last_update(dtype):
        options = dataclasses.replace(BARE, spectrum=spectrum, root_dtype=dtype)
        tx = optalr.scale_by_kronecker(decay=0.95, options=options)
        state = tx.init(grads)
        before = jax.eval_shape(lambda: state)
        for batch in batches:
            updates, state = jax.jit(tx.update)(grads, state, signals=batch)
        assert jax.eval_shape(lambda: state) == before
        return updates["w"], state

    (exact, whole), (close, half) = last_update(None), last_update("bfloat16")
    assert half.memory.rows.root["w"].dtype == half.memory.cols.root["w"].dtype == jnp.bfloat16
    assert half.memory.rows.factor["w"].dtype == whole.memory.rows.root["w"].dtype == jnp.float32
    assert int(half.failures) == 0
    assert float(jnp.linalg.norm(close - exact) / jnp.linalg.norm(exact)) < 0.02


@pytest.mark.parametrize("spectrum", ["factored", "exact", "measured"])
def test_a_refreshed_basis_follows_the_factors(spectrum):
    grads, batches = drifting_problem()
    options = dataclasses.replace(BARE, spectrum=spectrum)

    def last_update(method):
        tx = optalr.scale_by_kronecker(
            decay=0.95, options=dataclasses.replace(options, root_method=method)
        )
        step = jax.jit(lambda g, s, b: tx.update(g, s, signals=b))
        state = tx.init(grads)
        updates = grads
        for batch in batches:
            updates, state = step(grads, state, batch)
        return updates["w"], state

    exact, _ = last_update("eigh")
    warm, state = last_update("eigenbasis")
    assert int(state.num_refreshes) >= 4
    assert int(state.failures) == 0
    # Not eigh's answer, whose residual is rounding, but near it.
    assert float(state.root_residual) > 1e-4
    error = jnp.linalg.norm(warm - exact) / jnp.linalg.norm(exact)
    assert float(error) < 0.1
    held = state.memory.rows.basis if spectrum == "factored" else state.memory.rows.root
    basis = np.asarray(held["w"])
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=1e-5)


def test_a_basis_that_fell_behind_is_taken_anew():
    grads, batches = drifting_problem()
    options = dataclasses.replace(BARE, root_method="eigenbasis")
    tx = optalr.scale_by_kronecker(decay=0.0, options=options)
    step = jax.jit(lambda g, s, b: tx.update(g, s, signals=b))
    state = tx.init(grads)
    _, state = step(grads, state, batches[0])
    assert float(state.root_residual) < 1e-4  # a full decomposition at the start
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((12, 12)))[0]
    rows = jnp.asarray((turn * np.geomspace(1, 0.01, 12)) @ turn.T, jnp.float32)
    wild = {"w": dataclasses.replace(batches[0]["w"], rows=rows)}
    _, state = step(grads, state, wild)
    assert int(state.failures) == 0
    assert float(state.root_residual) < 1e-2


def test_the_root_method_is_checked():
    with pytest.raises(ValueError, match="root_method"):
        optalr.KroneckerOptions(root_method="svd")


# Layers in other orders, other places and in stacks.


def deep(params, x, y):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return jnp.mean(jnp.sum(jnp.square(x - y), -1))


def scanned(params, x, y):
    def body(x, layer):
        return jnp.tanh(x @ layer["w"] + layer["b"][None]), None

    x, _ = jax.lax.scan(body, x, params["layers"])
    return jnp.mean(jnp.sum(jnp.square(x - y), -1))


def deep_problem():
    rng = np.random.default_rng(1)
    layers = [
        {
            "w": jnp.asarray(rng.standard_normal((5, 5)) / 2, jnp.float32),
            "b": jnp.asarray(rng.standard_normal(5) / 9, jnp.float32),
        }
        for _ in range(3)
    ]
    x, y = (jnp.asarray(rng.standard_normal((9, 5)), jnp.float32) for _ in range(2))
    return layers, x, y


@functools.partial(jax.jit, static_argnums=(0, 1))
def _two_steps(loss, tx, params, x, y):
    evaluate = optalr.value_grad_and_extras(loss)
    state = tx.init(params)
    for _ in range(2):
        _, grads, extras = evaluate(params, x, y)
        updates, state = tx.update(grads, state, params, **extras)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.1 * u, updates))
    return updates


def test_the_order_of_layers_in_the_tree_does_not_matter():
    layers, x, y = deep_problem()
    tx = optalr.scale_by_kronecker(options=dataclasses.replace(BARE, max_update=0.5))
    straight = _two_steps(deep, tx, {"layers": layers}, x, y)["layers"]

    def other(params, x, y):  # the same net, its leaves elsewhere in the tree
        return deep({"layers": [params["z"], params["m"], params["a"]]}, x, y)

    named = _two_steps(other, tx, dict(zip("zma", layers, strict=True)), x, y)
    for expected, name in zip(straight, "zma", strict=True):
        for part in ("w", "b"):
            np.testing.assert_allclose(named[name][part], expected[part], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_layers_under_scan_are_updated_as_layers_in_a_loop(joint):
    layers, x, y = deep_problem()
    options = dataclasses.replace(BARE, max_update=0.5, joint_bias=joint)
    updates = []
    for loss, params in (
        (deep, {"layers": layers}),
        (scanned, {"layers": jax.tree.map(lambda *parts: jnp.stack(parts), *layers)}),
    ):
        layout = optalr.coverage(loss, params, x, y, options=options)
        tx = optalr.scale_by_kronecker(layout=layout, options=options)
        updates.append(_two_steps(loss, tx, params, x, y)["layers"])
    loop, stack = updates
    for i, layer in enumerate(loop):
        for part in ("w", "b"):
            np.testing.assert_allclose(stack[part][i], layer[part], rtol=1e-4, atol=1e-5)


def test_nn_scan_is_updated_as_the_same_blocks_in_a_loop():
    nn = pytest.importorskip("flax.linen")

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(5)(x)), None

    stack = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    layers, x, y = deep_problem()
    renamed = [{"kernel": layer["w"], "bias": layer["b"]} for layer in layers]
    params = {"Dense_0": jax.tree.map(lambda *parts: jnp.stack(parts), *renamed)}

    def loss(params, x, y):
        out, _ = stack.apply({"params": params}, x, None)
        return jnp.mean(jnp.sum(jnp.square(out - y), -1))

    options = dataclasses.replace(BARE, max_update=0.5)
    layout = optalr.coverage(loss, params, x, y)
    tx = optalr.scale_by_kronecker(layout=layout, options=options)
    stacked = _two_steps(loss, tx, params, x, y)["Dense_0"]
    plain = optalr.scale_by_kronecker(options=options)
    loop = _two_steps(deep, plain, {"layers": layers}, x, y)["layers"]
    for i, layer in enumerate(loop):
        np.testing.assert_allclose(stacked["kernel"][i], layer["w"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stacked["bias"][i], layer["b"], rtol=1e-4, atol=1e-5)
