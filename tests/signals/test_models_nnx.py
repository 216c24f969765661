"""Flax nnx models, split into a graph and its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optalr
from tests.signals.reference import (
    check_capture,
    cross_entropy,
    no_layer,
    reference_moments,
    stack_slice,
    standard_normal,
)
from tests.signals.reference_layers import conv_patches


def plain(params):
    """Return the parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(params) if isinstance(params, nnx.State) else params


def moments_at(*path):
    def pick(extras):
        node = extras["signals"]
        for part in path:
            node = node[part]
        return _value(node)

    return pick


def _value(node):
    return node.get_value() if hasattr(node, "get_value") else node


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.hidden = nnx.Linear(36, 5, rngs=rngs)
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
        return self.out(jnp.tanh(nnx.remat(lambda m, h: m(h))(self.hidden, h)))


def test_convolution_with_batch_statistics_and_dense_layers():
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    x, y = standard_normal(1, 6, 5, 6, 2), jnp.arange(6) % 3

    def loss(params, x, y, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        value = cross_entropy(model(x), y)
        return value, nnx.state(model, nnx.BatchStat)

    def reference(p, x, y, layer):
        h = jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = layer("conv", conv_patches(x, (3, 3), (2, 2), "SAME"), h)
        h = (h - h.mean((0, 1, 2))) / jnp.sqrt(h.var((0, 1, 2)) + 1e-5)
        h = nnx.relu(h * p["norm"]["scale"] + p["norm"]["bias"]).reshape(x.shape[0], -1)
        for name in ("hidden", "out"):
            h = layer(name, h, h @ p[name]["kernel"]) + p[name]["bias"]
            h = jnp.tanh(h) if name == "hidden" else h
        return cross_entropy(h, y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(reference, plain(params), x, y, num_examples=6)
    kernels = {name: moments_at(name, "kernel") for name in expected}
    extras = check_capture(loss, params, (x, y, rest), expected, kernels, has_aux=True)
    report = optalr.coverage(loss, params, x, y, rest)
    assert sorted(report.treatment.values()) == ["bias"] * 2 + ["diagonal"] * 2 + ["kronecker"] * 3
    kernel = next(leaf for leaf in report.leaves if "hidden" in leaf.path and leaf.view)
    assert moments_at("hidden", "kernel")(extras).bias == kernel.view.bias
    assert "['hidden']['bias']" in kernel.view.bias


class Sequence(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs), rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        return self.embed.attend(self.rnn(self.norm(h + self.attention(h))))


def test_attention_recurrence_and_a_tied_embedding():
    graph, params, rest = nnx.split(Sequence(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.randint(jax.random.key(1), (5, 3), 0, 7)
    y = jnp.roll(x, -1, 1)

    def loss(params, x, y, rest):
        return cross_entropy(nnx.merge(graph, params, rest, copy=True)(x), y)

    def reference(p, x, y, layer):
        embedding = p["embed"]["embedding"]
        h, a = embedding[x], p["attention"]

        def dense(name, x):
            kernel = a[name]["kernel"].reshape(4, 4)
            return layer(name, x, x @ kernel) + a[name]["bias"].reshape(4)

        q, k, v = (dense(name, h).reshape(5, 3, 2, 2) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k) / jnp.sqrt(2.0))
        h = h + dense("out", jnp.einsum("nhts,nshk->nthk", weights, v).reshape(5, 3, 4))
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
        h = h * p["norm"]["scale"] + p["norm"]["bias"]
        hidden = cell = jnp.zeros((5, 4), h.dtype)
        cells, rows = p["rnn"]["cell"], []
        for t in range(3):
            gates = layer("dense_i", h[:, t], h[:, t] @ cells["dense_i"]["kernel"])
            gates = gates + layer("dense_h", hidden, hidden @ cells["dense_h"]["kernel"])
            i, f, g, o = jnp.split(gates + cells["dense_h"]["bias"], 4, -1)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            rows.append(hidden)
        h = jnp.stack(rows, 1)
        return cross_entropy(layer("embed", h, h @ embedding.T), y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(reference, plain(params), x, y, num_examples=5)
    kernels = {name: moments_at("attention", name, "kernel") for name in expected}
    kernels |= {n: moments_at("rnn", "cell", n, "kernel") for n in ("dense_i", "dense_h")}
    kernels["embed"] = moments_at("embed", "embedding")
    extras = check_capture(loss, params, (x, y, rest), expected, kernels)
    assert moments_at("rnn", "cell", "dense_h", "kernel")(extras).positions == 3
    report = optalr.coverage(loss, params, x, y, rest)
    embedding = next(leaf for leaf in report.leaves if "embedding" in leaf.path)
    assert embedding.reason == "not in the moments: read by a table lookup (gather)"
    assert embedding.view.input_side == "cols"


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, h):
        return h + jnp.tanh(self.linear(h))


def test_layers_stacked_by_nnx_vmap_and_run_by_nnx_scan():
    make = nnx.split_rngs(splits=3)(nnx.vmap(Layer, in_axes=0, out_axes=0))
    model = make(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, y = standard_normal(1, 6, 4), jnp.arange(6) % 4

    def loss(params, x, y, layer=no_layer):
        if layer is not no_layer:
            h = x
            for i in range(3):
                w, b = params["linear"]["kernel"][i], params["linear"]["bias"][i]
                h = h + jnp.tanh(layer(f"{i}", h, h @ w) + b[None])
            return cross_entropy(h, y)
        step = nnx.scan(lambda h, m: m(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return cross_entropy(step(x, nnx.merge(graph, params, rest, copy=True)), y)

    expected = reference_moments(loss, plain(params), x, y, num_examples=6)
    kernels = {
        name: lambda e, i=int(name): stack_slice(moments_at("linear", "kernel")(e), i)
        for name in expected
    }
    check_capture(loss, params, (x, y), expected, kernels)
    report = optalr.coverage(loss, params, x, y, strict=True)
    kernel = next(leaf for leaf in report.leaves if leaf.view)
    assert kernel.view.stack == (0,)
    assert "['bias']" in kernel.view.bias
    assert np.prod(kernel.shape) == 48
