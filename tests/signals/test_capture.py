"""Captured moments against a brute-force float64 reference, on bare JAX models.

The reference never looks at a jaxpr: each model calls ``layer(name, inputs, outputs)`` at every
product, the reference keeps the inputs and differentiates the loss by what it adds to the outputs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from tests.signals.reference import (
    assert_moments,
    check_capture,
    cross_entropy,
    no_layer,
    reference_moments,
    stack_slice,
    standard_normal,
)


def mlp(params, x, y, layer=no_layer):
    h = x
    for i in range(2):
        h = layer(f"w{i}", h, h @ params[f"w{i}"]) + params[f"b{i}"][None, :]
        h = jnp.tanh(h) if i == 0 else h
    return cross_entropy(h, y)


def mlp_params(key):
    keys = jax.random.split(key, 4)
    return {
        "w0": standard_normal(keys[0], 5, 7) * 0.5,
        "b0": standard_normal(keys[1], 7) * 0.1,
        "w1": standard_normal(keys[2], 7, 3) * 0.5,
        "b1": standard_normal(keys[3], 3) * 0.1,
    }


@pytest.fixture(scope="module")
def batch():
    return standard_normal(1, 16, 5), jnp.arange(16) % 3


@pytest.fixture(scope="module")
def mlp_moments(batch):
    return reference_moments(mlp, mlp_params(jax.random.key(0)), *batch, num_examples=16)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_mlp_moments_and_bit_equal_gradients(batch, mlp_moments, wrap):
    params, expected = mlp_params(jax.random.key(0)), mlp_moments
    value, grads, extras = wrap(optalr.value_grad_and_extras(mlp))(params, *batch)
    expected_value, expected_grads = wrap(jax.value_and_grad(mlp))(params, *batch)
    assert value == expected_value
    for name in params:
        np.testing.assert_array_equal(grads[name], expected_grads[name])
    for name in ("w0", "w1"):
        moments = extras["signals"][name]
        assert_moments(moments, expected[name])
        assert moments.count == 16
        assert moments.positions == 1
        assert moments.bias == f"['b{name[1]}']"
    assert extras["signals"]["b0"] is None
    assert_moments(extras["head"], expected["w1"])


def test_a_traced_flag_measures_or_not_and_the_structure_stays(batch):
    params = mlp_params(jax.random.key(0))
    evaluate = optalr.value_grad_and_extras(mlp)
    step = jax.jit(lambda flag: evaluate(params, *batch, signals=flag)[2]["signals"])
    on, off = step(True), step(False)
    always = jax.jit(evaluate)(params, *batch)[2]["signals"]
    never = evaluate(params, *batch, signals=False)[2]["signals"]
    assert jax.tree.structure(on) == jax.tree.structure(off) == jax.tree.structure(never)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), on, always)
    for leaf in jax.tree.leaves((off, never)):
        assert not np.any(leaf)


def scanned(params, x, y, layer=no_layer):
    """Three stacked layers, each followed by a layer shared by all of them."""

    def block(h, weights):
        h = jnp.tanh(h @ weights["w"] + weights["b"][None, :])
        return jnp.tanh(h @ params["shared"]), None

    if layer is no_layer:
        h, _ = jax.lax.scan(jax.checkpoint(block), x, params["stack"])
    else:
        h = x
        for i in range(3):
            w = params["stack"]["w"][i]
            h = jnp.tanh(layer(f"w{i}", h, h @ w) + params["stack"]["b"][i][None, :])
            h = jnp.tanh(layer("shared", h, h @ params["shared"]))
    return cross_entropy(layer("out", h, h @ params["out"]), y)


# With few examples the operands are smaller than the moments, with many they are larger.
@pytest.fixture(scope="module", params=[3, 300])
def conv_problem(request):
    """Return a batch size, the evaluation as it is and compiled, arguments, and jax's gradient."""
    size = request.param
    keys = jax.random.split(jax.random.key(2), 3)
    params = {
        "conv": standard_normal(keys[0], 3, 3, 2, 8),
        "dense": standard_normal(keys[1], 72, 20),
    }
    x = standard_normal(keys[2], size, 3, 3, 2)

    def loss_fn(params, x):
        h = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.sum((jnp.tanh(h).reshape(size, -1) @ params["dense"]) ** 2, 1))

    evaluate = optalr.value_grad_and_extras(loss_fn)
    compiled = jax.jit(lambda p, x, flag: evaluate(p, x, signals=flag))
    return size, evaluate, compiled, (params, x), jax.jit(jax.grad(loss_fn))(params, x)


@pytest.mark.parametrize("flag", [True, False])
def test_measure_gives_what_signals_hold(conv_problem, flag):
    size, evaluate, compiled, args, plain_grads = conv_problem
    _, grads, extras = compiled(*args, flag)
    _, _, expected = evaluate(*args, signals=flag)
    chex.assert_trees_all_equal(grads, plain_grads)
    for got in (extras["signals"], extras["measure"](), expected["measure"]()):
        for x, like in zip(*map(jax.tree.leaves, (got, expected["signals"])), strict=True):
            np.testing.assert_allclose(x, like, rtol=1e-5, atol=1e-5 * np.max(np.abs(like)))
    assert float(extras["signals"]["conv"].count) == (size if flag else 0)


def test_a_kernel_used_in_parts_sums_over_its_parts(batch):
    x, y = batch
    keys = jax.random.split(jax.random.key(5), 2)
    width = x.shape[-1]
    params = {
        "by_columns": standard_normal(keys[0], width, 9),
        "by_rows": standard_normal(keys[1], 9, 3),
    }

    def model(params, x, y, layer=no_layer):
        left, right = jnp.split(params["by_columns"], [4], axis=1)
        if layer is no_layer:
            h = jnp.concatenate([jnp.tanh(x @ left), jnp.cos(x) @ right], 1)
            first, last = params["by_rows"][:2], params["by_rows"][2:]
            return cross_entropy(jnp.tanh(h[:, :2] @ first) + h[:, 2:] @ last, y)
        of_x = layer("by_columns", x, x @ params["by_columns"])[:, :4]
        of_cos = layer("by_columns", jnp.cos(x), jnp.cos(x) @ params["by_columns"])[:, 4:]
        h = jnp.concatenate([jnp.tanh(of_x), of_cos], 1)
        parts = [h.at[:, 2:].set(0), h.at[:, :2].set(0)]
        first, last = (layer("by_rows", part, part @ params["by_rows"]) for part in parts)
        return cross_entropy(jnp.tanh(first) + last, y)

    expected = reference_moments(model, params, x, y, num_examples=len(x))
    kernels = {name: name for name in params}
    extras = check_capture(model, params, batch, expected, kernels)
    assert extras["signals"]["by_columns"].positions == 2
    assert [leaf.treatment for leaf in optalr.coverage(model, params, *batch).leaves] == [
        "kronecker",
        "kronecker",
    ]
    assert_moments(extras["head"], _head_by_hand(params, batch))


def _head_by_hand(params, batch):
    """Return the moments of the layer executed last: the product with the last rows alone."""
    x, y = batch
    left, right = params["by_columns"][:, :4], params["by_columns"][:, 4:]
    h = jnp.concatenate([jnp.tanh(x @ left), jnp.cos(x) @ right], 1)
    inputs = h.at[:, :2].set(0)
    first = jnp.tanh(h[:, :2] @ params["by_rows"][:2])
    beta = jax.grad(lambda z: len(x) * cross_entropy(first + z, y))(inputs @ params["by_rows"])
    return inputs.T @ inputs / len(x), beta.T @ beta / len(x), inputs.mean(0)


def test_scanned_layers_come_out_stacked_and_shared_ones_summed(batch):
    x, y = batch
    keys = jax.random.split(jax.random.key(3), 3)
    params = {
        "stack": {"w": standard_normal(keys[0], 3, 5, 5), "b": jnp.full((3, 5), 0.1)},
        "shared": standard_normal(keys[1], 5, 5),
        "out": standard_normal(keys[2], 5, 3),
    }
    _, grads, extras = jax.jit(optalr.value_grad_and_extras(scanned))(params, x, y)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.jit(jax.grad(scanned))(params, x, y))
    expected = reference_moments(scanned, params, x, y, num_examples=16)
    stack = extras["signals"]["stack"]["w"]
    assert stack.rows.shape == (3, 5, 5)
    assert stack.bias == "['stack']['b']"
    for i in range(3):
        one = stack_slice(stack, i)
        assert_moments(one, expected[f"w{i}"])
    shared = extras["signals"]["shared"]
    assert_moments(shared, expected["shared"])
    assert shared.positions == 3
    view = optalr.coverage(scanned, params, x, y)["['stack']['w']"].view
    assert view.stack == (0,)


def test_bad_input_is_named(batch):
    params = mlp_params(jax.random.key(0))
    evaluate = optalr.value_grad_and_extras(mlp)
    with pytest.raises(
        TypeError, match=r"params must be .* floating arrays, but \['w0'\] is int32"
    ):
        evaluate({**params, "w0": jnp.ones((5, 7), jnp.int32)}, *batch)
    with pytest.raises(TypeError, match=r"loss_fn must return a floating scalar.*shape \(16, 5\)"):
        optalr.value_grad_and_extras(lambda p, x: x)(params, batch[0])
    with pytest.raises(TypeError, match="has_aux=True"):
        optalr.value_grad_and_extras(lambda p, x: (jnp.sum(x), 1))(params, batch[0])
    with pytest.raises(TypeError, match="signals must be a boolean scalar"):
        evaluate(params, *batch, signals=jnp.ones(3))
    with pytest.raises(TypeError, match="cannot be differentiated while it captures signals"):
        jax.grad(lambda p: sum(jnp.sum(g) for g in jax.tree.leaves(evaluate(p, *batch)[1])))(params)
    off = lambda p: jnp.sum(evaluate(p, *batch, signals=False)[1]["w0"])  # noqa: E731
    second = jax.jit(jax.grad(off))(params)
    assert np.all(np.isfinite(second["w1"]))
    with pytest.raises(ValueError, match="max_positions must be at least 1"):
        optalr.value_grad_and_extras(mlp, max_positions=0)


def test_coverage_names_every_leaf_and_the_reason(batch):
    x, y = batch
    params = mlp_params(jax.random.key(0)) | {"scale": jnp.ones(3), "unused": jnp.ones((2, 2))}

    def loss(p, x, y):
        return mlp(p, x, y) + 0.0 * jnp.sum(p["scale"] * x[0, :3]) + 1e-4 * jnp.sum(p["w0"] ** 2)

    report = optalr.coverage(loss, params, x, y)
    assert report.treatment == {
        "['b0']": "bias",
        "['b1']": "bias",
        "['scale']": "diagonal",
        "['unused']": "diagonal",
        "['w0']": "kronecker",
        "['w1']": "kronecker",
    }
    assert report["['scale']"].reason == "used by mul"
    assert report["['unused']"].reason == "not used by the loss"
    text = str(report)
    assert all(path in text for path in report.treatment)
    with pytest.raises(ValueError, match=r"2 of 6 leaves fall back.*\['scale'\] \(used by mul\)"):
        optalr.coverage(loss, params, x, y, strict=True)
