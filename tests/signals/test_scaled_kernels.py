"""Kernels that are scaled by one number before their product, as spectral normalization does."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import optalr
from tests.signals.reference import (
    assert_moments,
    check_capture,
    no_layer,
    random_params,
    reference_moments,
)
from tests.signals.reference_layers import conv_patches
from tests.signals.test_models_bare import normal

UNFELT = "not in the moments: multiplied where no derivative of the loss arrives"
IDENTITY = lambda f: f  # noqa: E731
WRAPS = [IDENTITY, jax.jit, jax.checkpoint]


def normalize(w, u, *, stop):
    """Return ``W / σ`` by one power iteration from ``u``, and σ."""
    v = w.T @ u
    v = v / jnp.linalg.norm(v)
    u = w @ v
    u = u / jnp.linalg.norm(u)
    if stop:
        u, v = jax.lax.stop_gradient((u, v))
    sigma = u @ w @ v
    return w / sigma, sigma


def scaled_layer(name, layer, product, scale):
    """Return ``c`` times ``product``, perturbed before it is scaled by a constant ``c``."""
    inputs, outputs = product
    return layer(name, inputs, outputs) * jax.lax.stop_gradient(scale)


@pytest.mark.parametrize("wrap", WRAPS, ids=["plain", "jit", "remat"])
@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "differentiated"])
@pytest.mark.parametrize("examples", [6, 1])
def test_power_iteration_by_hand(wrap, stop, examples):
    """The moments are those of W with σ held fixed, for any batch, wherever σ's derivative goes."""

    def hidden(params, u, x, layer):
        w, sigma = normalize(params["w"], u, stop=stop)
        if layer is no_layer:
            return jnp.tanh(x @ w + params["b"][None])
        s = scaled_layer("w", layer, (x, x @ params["w"]), 1 / sigma)
        return jnp.tanh(s + params["b"][None])

    def loss(params, x, y, layer=no_layer):
        u = jnp.ones(4) / 2
        body = lambda params, u, x: hidden(params, u, x, layer)  # noqa: E731
        h = (wrap if layer is no_layer else IDENTITY)(body)(params, u, x)
        return jnp.mean(jnp.sum((layer("head", h, h @ params["head"]) - y) ** 2, 1))

    params = {"w": normal(0, 4, 5), "b": normal(1, 5), "head": normal(2, 5, 3)}
    x, y = normal(3, examples, 4), normal(4, examples, 3)
    expected = reference_moments(loss, params, x, y, num_examples=examples)
    extras = check_capture(loss, params, (x, y), expected, {name: name for name in expected})
    assert (extras["signals"]["w"].count, extras["signals"]["w"].positions) == (examples, 1)
    assert_moments(extras["head"], expected["head"])
    report = optalr.coverage(loss, params, x, y, strict=True)
    assert report["['w']"].view.bias == "['b']"


def test_a_scanned_stack_of_normalized_layers_each_with_its_own_scale():
    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:

            def step(h, w):
                return jnp.tanh(h @ normalize(w, jnp.ones(4), stop=True)[0]), None

            h = jax.lax.scan(step, x, params["w"])[0]
        else:
            h = x
            for i, w in enumerate(params["w"]):
                sigma = normalize(w, jnp.ones(4), stop=True)[1]
                h = jnp.tanh(scaled_layer(f"w{i}", layer, (h, h @ w), 1 / sigma))
        return jnp.mean(jnp.sum((h - y) ** 2, 1))

    params, x, y = {"w": normal(0, 3, 4, 4)}, normal(1, 5, 4), normal(2, 5, 4)
    expected = reference_moments(loss, params, x, y, num_examples=5)
    extras = check_capture(loss, params, (x, y))
    moments = extras["signals"]["w"]
    assert moments.count == 5
    for i in range(3):
        inputs, outputs, mean = expected[f"w{i}"]
        np.testing.assert_allclose(moments.rows[i], inputs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments.cols[i], outputs, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(moments.row_mean[i], mean, rtol=1e-4, atol=1e-6)


class Critic(nn.Module):
    """A spectrally normalized convolution and two dense layers."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(4, (3, 3), padding="VALID", name="conv")
        h = jnp.tanh(nn.SpectralNorm(conv, name="sn0")(x, update_stats=True))
        h = h.reshape(h.shape[0], -1)
        h = jnp.tanh(nn.SpectralNorm(nn.Dense(5, name="dense"), name="sn1")(h, update_stats=True))
        return nn.SpectralNorm(nn.Dense(2, name="head"), name="sn2")(h, update_stats=True)


@pytest.mark.parametrize("state", ["argument", "closed_over", "batch_closed_over"])
@pytest.mark.parametrize("examples", [4, 1])
def test_flax_linen(state, examples):
    model = Critic()
    x, y = normal(0, examples, 4, 4, 2), normal(1, examples, 2)
    variables = random_params(model.init, jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]

    def apply(params, stats, x):
        return model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])

    def value(params, stats, x, y):
        out, new = apply(params, stats, x)
        return jnp.mean(jnp.sum((out - y) ** 2, 1)), new

    def by_hand(params, x, y, layer):
        sigmas = {
            name: new[f"{name}/kernel/sigma"]
            for new in apply(params, stats, x)[1]["batch_stats"].values()
            for name in ("conv", "dense", "head")
            if f"{name}/kernel/sigma" in new
        }
        alpha = conv_patches(x, (3, 3), (1, 1), "VALID")
        s = alpha @ params["conv"]["kernel"].reshape(-1, 4)
        h = scaled_layer("conv", layer, (alpha, s), 1 / sigmas["conv"])
        h = jnp.tanh(h + params["conv"]["bias"][None, None, None])
        h = h.reshape(h.shape[0], -1)
        for name in ("dense", "head"):
            s = scaled_layer(name, layer, (h, h @ params[name]["kernel"]), 1 / sigmas[name])
            h = s + params[name]["bias"][None]
            h = jnp.tanh(h) if name == "dense" else h
        return jnp.mean(jnp.sum((h - y) ** 2, 1))

    loss, args = {
        "argument": (value, (stats, x, y)),
        "closed_over": (lambda p, x, y: value(p, stats, x, y), (x, y)),
        "batch_closed_over": (lambda p: value(p, stats, x, y), ()),
    }[state]
    expected = reference_moments(by_hand, params, x, y, num_examples=examples)
    # With x64 on, as for the reference, power iterations agree to the digits of float32 only.
    extras = check_capture(
        loss, params, args, expected, has_aux=True, rtol=1e-4, gradient_rtol=1e-6
    )
    assert_moments(extras["head"], expected["head"], rtol=1e-4)
    report = optalr.coverage(loss, params, *args, strict=True)
    for name in ("conv", "dense", "head"):
        leaf = report[f"['{name}']['kernel']"]
        assert leaf.view.bias == f"['{name}']['bias']"
        assert leaf.reason == UNFELT


@pytest.mark.skipif(not hasattr(nnx, "SpectralNorm"), reason="this Flax has no nnx.SpectralNorm")
def test_flax_nnx():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
            self.head = nnx.Linear(5, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.tanh(self.dense(x, update_stats=True)))

    graph, params, stats = nnx.split(Net(), nnx.Param, ...)
    x, y = normal(0, 6, 4), normal(1, 6, 2)

    def loss(params, stats, x, y):
        return jnp.mean(jnp.sum((nnx.merge(graph, params, stats, copy=True)(x) - y) ** 2, 1))

    def by_hand(params, x, y, layer):
        inner, head = params["dense"]["layer_instance"], params["head"]
        kernel = inner["kernel"][...]
        (u,) = (v[0] for v in jax.tree.leaves(stats) if v.ndim == 2)
        sigma = jnp.linalg.norm(kernel.T @ (kernel @ u / jnp.linalg.norm(kernel @ u)))
        s = scaled_layer("dense", layer, (x, x @ kernel), 1 / sigma)
        h = jnp.tanh(s + inner["bias"][...][None])
        s = layer("head", h, h @ head["kernel"][...]) + head["bias"][...][None]
        return jnp.mean(jnp.sum((s - y) ** 2, 1))

    names = {"dense": "dense/layer_instance/kernel", "head": "head/kernel"}
    expected = reference_moments(by_hand, params, x, y, num_examples=6)
    extras = check_capture(loss, params, (stats, x, y), expected, names, rtol=1e-4)
    assert_moments(extras["head"], expected["head"], rtol=1e-4)
    reasons = {
        leaf.reason for leaf in optalr.coverage(loss, params, stats, x, y, strict=True).leaves
    }
    assert reasons == {"", UNFELT}


def test_equinox():
    class Net(eqx.Module):
        dense: eqx.nn.SpectralNorm
        head: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.dense = eqx.nn.SpectralNorm(
                eqx.nn.Linear(4, 5, key=keys[0]), "weight", key=keys[1]
            )
            self.head = eqx.nn.Linear(5, 2, key=keys[2])

        def __call__(self, x, state):
            x, state = self.dense(x, state)
            return self.head(jnp.tanh(x)), state

    net, state = eqx.nn.make_with_state(Net)()
    params, static = eqx.partition(net, eqx.is_inexact_array)
    x, y = normal(0, 6, 4), normal(1, 6, 2)

    def loss(params, state, x, y):
        call = jax.vmap(eqx.combine(params, static), in_axes=(0, None), out_axes=(0, None))
        out, state = call(x, state)
        return jnp.mean(jnp.sum((out - y) ** 2, 1)), state

    report = optalr.coverage(loss, params, state, x, y)
    assert report[".dense.layer.weight"].view.bias == ".dense.layer.bias"
    assert report[".head.weight"].reason == ""

    def by_hand(params, x, y, layer):
        w = params.dense.layer.weight
        (v,) = (leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,))
        u = w @ v / jnp.linalg.norm(w @ v)
        sigma = jnp.linalg.norm(w.T @ u)
        s = scaled_layer("dense", layer, (x, x @ w.T), 1 / sigma)
        h = jnp.tanh(s + params.dense.layer.bias[None])
        s = layer("head", h, h @ params.head.weight.T) + params.head.bias[None]
        return jnp.mean(jnp.sum((s - y) ** 2, 1))

    expected = reference_moments(by_hand, params, x, y, num_examples=6)
    names = {"dense": "dense/layer/weight", "head": "head/weight"}
    check_capture(loss, params, (state, x, y), expected, names, has_aux=True, rtol=1e-4)


def test_scales_of_every_kind():
    """A constant, a gain that is learned, two scales, a bias, a broadcast σ, kernels joined."""

    def loss(params, x, y, layer=no_layer):
        gain = jnp.exp(params["gain"])
        width = jnp.linalg.norm(params["split"], keepdims=True)
        plain = layer is no_layer

        def scaled(name, h, scale):
            if plain:
                return h @ (params[name] * scale)
            return scaled_layer(name, layer, (h, h @ params[name]), scale)

        h = jnp.tanh(scaled("zero", x, 0.25) + 2 * params["b"][None])
        h = jnp.tanh(scaled("gained", h, gain) + params["gain"])
        if plain:
            h = h @ (gain * params["twice"] / jnp.mean(x**2))
            left, right = params["left"] * 3.0, params["right"] / gain
            h = jnp.tanh(h) @ jnp.concatenate([left, right], 1)
            h = jnp.tanh(h) @ (params["split"] / jnp.broadcast_to(width, (5, 4))).T.reshape(4, 5).T
        else:
            h = jnp.tanh(scaled("twice", h, gain / jnp.mean(x**2)))
            h = jnp.concatenate([scaled("left", h, 3.0), scaled("right", h, 1 / gain)], 1)
            h = scaled("split", jnp.tanh(h), 1 / width)
        return jnp.mean(jnp.sum((h - y) ** 2, 1))

    params = {"zero": jnp.zeros((4, 3)), "b": normal(0, 3), "gained": normal(1, 3, 4)}
    params |= {"gain": jnp.float32(0.3), "twice": normal(2, 4, 4), "left": normal(3, 4, 2)}
    params |= {"right": normal(4, 4, 3), "split": normal(5, 5, 4)}
    x, y = normal(6, 6, 4), normal(7, 6, 4)
    expected = reference_moments(loss, params, x, y, num_examples=6)
    assert len(expected) == 6
    extras = check_capture(
        loss, params, (x, y), expected, {name: name for name in expected}, gradient_rtol=1e-6
    )
    assert_moments(extras["head"], expected["split"])
    report = optalr.coverage(loss, params, x, y)
    # Its gradients are twice those of the outputs, whose factor would not fit it.
    assert report["['b']"].treatment == "diagonal"
    assert report["['gain']"].reason.startswith("used by exp")


@pytest.mark.parametrize("on", [True, False])
def test_operands_that_are_measured_later_are_scaled_as_well(on):
    """With a traced flag a wide layer of a small batch hands its operands on."""

    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            s = x @ (params["w"] / jnp.linalg.norm(params["w"]))
        else:
            norm = jnp.linalg.norm(params["w"])
            s = scaled_layer("w", layer, (x, x @ params["w"]), 1 / norm)
        return jnp.mean(jnp.sum((s - y) ** 2, 1))

    params, x, y = {"w": normal(0, 20, 30)}, normal(1, 3, 20), normal(2, 3, 30)
    expected = reference_moments(loss, params, x, y, num_examples=3)
    evaluate = jax.jit(optalr.value_grad_and_extras(loss))
    _, _, extras = evaluate(params, x, y, signals=jnp.array(on))
    if on:
        assert_moments(extras["signals"]["w"], expected["w"])
        assert_moments(extras["measure"]()["w"], expected["w"])
    else:
        assert extras["signals"]["w"].count == 0


def test_a_hand_tap_of_a_scaled_kernel_measures_the_leaf():
    def loss(params, x, y, layer=no_layer):
        w = params["w"] / 4.0
        s = jnp.sin(x @ jnp.sin(w))
        s = optalr.tap_layer(s, x, w) if layer is no_layer else layer("w", x, s * 4) / 4
        return jnp.mean(jnp.sum((s - y) ** 2, 1))

    params, x, y = {"w": normal(0, 4, 3)}, normal(1, 6, 4), normal(2, 6, 3)
    expected = reference_moments(loss, params, x, y, num_examples=6)
    check_capture(loss, params, (x, y), expected, {"w": "w"})


def test_half_precision():
    def loss(params, x, y):
        return jnp.mean((x @ (params["w"] / jnp.linalg.norm(params["w"])) - y) ** 2)

    params = {"w": normal(0, 4, 3)}
    x, y = normal(1, 6, 4), normal(2, 6, 3)
    wide = optalr.value_grad_and_extras(loss)(params, x, y)[2]["signals"]["w"]
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x, y))
    half = jax.jit(optalr.value_grad_and_extras(loss))(*halves)[2]["signals"]["w"]
    assert half.cols.dtype == jnp.float32
    np.testing.assert_allclose(half.cols, wide.cols, rtol=0.1, atol=0.1 * np.abs(wide.cols).max())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (  # the product cannot read a σ that another function computed
            lambda w, x: x @ jax.jit(lambda w: normalize(w, jnp.ones(4), stop=True)[0])(w),
            "scaled outside the function or loop that holds its product",
        ),
        (
            lambda w, x: jax.jit(jnp.matmul)(x, w / jnp.linalg.norm(w)),
            "scaled outside the function or loop that holds its product",
        ),
        (  # one number a column is no rescaling
            lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
            "used by div",
        ),
        (lambda w, x: x @ (2 / w), "used by div"),
    ],
    ids=["inner", "outer", "weight_norm", "divided"],
)
def test_kernels_that_are_not_followed(body, reason):
    def loss(params, x, y):
        return jnp.mean((body(params["w"], x) @ params["head"] - y) ** 2)

    params = {"w": normal(0, 4, 3), "head": normal(1, 3, 2)}
    x, y = normal(2, 5, 4), normal(3, 5, 2)
    report = optalr.coverage(loss, params, x, y)
    assert report["['w']"].treatment == "diagonal"
    assert reason in report["['w']"].reason
    assert report["['head']"].treatment == "kronecker"
