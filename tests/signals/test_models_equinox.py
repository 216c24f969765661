"""Equinox models: kernels ``(out, in)``, convolutions OIHW, one example at a time under vmap."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import optalr
from tests.signals.reference import (
    check_capture,
    cross_entropy,
    no_layer,
    reference_moments,
    standard_normal,
)


def dense(layer, name, params, x):
    out = layer(name, x, x @ params.weight.T)
    return out if params.bias is None else out + params.bias


class Net(eqx.Module):
    """Two convolutions (one grouped), a transposed one, and two dense layers."""

    conv: eqx.nn.Conv2d
    grouped: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose1d
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.conv = eqx.nn.Conv2d(
            3, 4, (3, 2), stride=(2, 1), padding=((1, 0), (0, 1)), key=keys[0]
        )
        self.grouped = eqx.nn.Conv2d(4, 6, 2, groups=2, use_bias=False, key=keys[1])
        self.up = eqx.nn.ConvTranspose1d(6, 2, 3, stride=2, key=keys[2])
        self.hidden = eqx.nn.Linear(26, 5, key=keys[3])
        self.out = eqx.nn.Linear(5, 3, use_bias=False, key=keys[4])

    def __call__(self, x):
        h = self.grouped(jnp.tanh(self.conv(x)))
        h = self.up(jnp.tanh(h.reshape(6, -1))).ravel()
        return self.out(jax.nn.relu(self.hidden(h)))


def patches(x, kernel, strides, padding, lhs_dilation=None):
    """Patches of channels-first data, ``(N, *out, C * area)``, channels major as in OIHW."""
    spatial = "HW"[2 - len(kernel) :]
    numbers = (f"NC{spatial}", f"OI{spatial}", f"N{spatial}C")
    return jax.lax.conv_general_dilated_patches(
        x, kernel, strides, padding, lhs_dilation=lhs_dilation, dimension_numbers=numbers
    )


def reference_net(params, x, y, layer):
    """The same network, written for a batch."""

    def conv(x, weight, strides, padding, groups=1, lhs_dilation=None):
        spatial = "HW"[4 - weight.ndim :]
        numbers = (f"NC{spatial}", f"OI{spatial}", f"N{spatial}C")
        return jax.lax.conv_general_dilated(
            x,
            weight,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    padding = ((1, 0), (0, 1))
    h = conv(x, params.conv.weight, (2, 1), padding)
    h = layer("conv", patches(x, (3, 2), (2, 1), padding), h)
    h = jnp.moveaxis(jnp.tanh(h + params.conv.bias[:, 0, 0]), -1, 1)
    p = patches(h, (2, 2), (1, 1), "VALID")
    p = p.reshape(*p.shape[:-1], 2, -1)
    h = layer("grouped", p, conv(h, params.grouped.weight, (1, 1), "VALID", groups=2))
    h = jnp.tanh(jnp.moveaxis(h, -1, 1).reshape(h.shape[0], 6, -1))
    p = patches(h, (3,), (1,), ((2, 2),), lhs_dilation=(2,))
    h = layer("up", p, conv(h, params.up.weight, (1,), ((2, 2),), lhs_dilation=(2,)))
    h = jnp.moveaxis(h + params.up.bias[:, 0], -1, 1).reshape(h.shape[0], -1)
    h = dense(layer, "hidden", params.hidden, h)
    return cross_entropy(dense(layer, "out", params.out, jax.nn.relu(h)), y)


def test_convolutions_and_dense_layers_under_vmap():
    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)
    x, y = standard_normal(1, 5, 3, 6, 4), jnp.arange(5) % 3

    def loss(params, x, y):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    with jax.numpy_rank_promotion("allow"):  # Equinox adds biases so
        expected = reference_moments(reference_net, params, x, y, num_examples=5)
        kernels = {name: f"{name}/weight" for name in expected}
        extras = check_capture(loss, params, (x, y), expected, kernels)
        report = optalr.coverage(loss, params, x, y, strict=True)
    assert report[".hidden.weight"].view.input_side == "cols"
    assert report[".hidden.weight"].view.bias == ".hidden.bias"
    conv = report[".conv.weight"].view
    assert (conv.rows, conv.cols, conv.bias) == ((0,), (1, 2, 3), ".conv.bias")
    assert report[".up.weight"].view.bias == ".up.bias"
    assert extras["signals"].hidden.weight.count == 5
    assert extras["signals"].hidden.weight.rows.shape == (5, 5)


class Sequence(eqx.Module):
    """An embedding, attention, a recurrent cell under scan, and a norm."""

    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(7, 4, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_output_bias=True, key=keys[1])
        self.norm = eqx.nn.LayerNorm(4)
        self.cell = eqx.nn.GRUCell(4, 3, key=keys[2])

    def __call__(self, tokens):
        h = jax.vmap(self.embed)(tokens)
        h = jax.vmap(self.norm)(h + self.attention(h, h, h))
        step = lambda state, row: (self.cell(row, state), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros(3, h.dtype), h)[0]


def reference_sequence(params, tokens, y, layer):
    h = params.embed.weight[tokens]
    a = params.attention
    q, k, v = (
        dense(layer, name, getattr(a, f"{name}_proj"), h).reshape(*h.shape[:2], 2, -1)
        for name in ("query", "key", "value")
    )
    weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k) / np.sqrt(q.shape[-1]))
    mixed = jnp.einsum("nhts,nshk->nthk", weights, v).reshape(*h.shape[:2], -1)
    h = h + dense(layer, "output", a.output_proj, mixed)
    mean, var = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    h = (h - mean) / jnp.sqrt(var + 1e-5) * params.norm.weight + params.norm.bias
    state = jnp.zeros((h.shape[0], 3), h.dtype)
    cell = params.cell
    for t in range(h.shape[1]):
        i = layer("ih", h[:, t], h[:, t] @ cell.weight_ih.T) + cell.bias
        g = layer("hh", state, state @ cell.weight_hh.T)
        (ir, iz, inew), (gr, gz, gnew) = jnp.split(i, 3, -1), jnp.split(g, 3, -1)
        reset, update = jax.nn.sigmoid(ir + gr), jax.nn.sigmoid(iz + gz)
        new = jnp.tanh(inew + reset * (gnew + cell.bias_n))
        state = new + update * (state - new)
    return cross_entropy(state, y)


def test_attention_and_a_recurrent_cell():
    params, static = eqx.partition(Sequence(jax.random.key(0)), eqx.is_inexact_array)
    tokens, y = jax.random.randint(jax.random.key(1), (6, 4), 0, 7), jnp.arange(6) % 3

    def loss(params, x, y):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(reference_sequence, params, tokens, y, num_examples=6)
        kernels = {n: f"attention/{n}_proj/weight" for n in ("query", "key", "value", "output")}
        kernels |= {"ih": "cell/weight_ih", "hh": "cell/weight_hh"}
        extras = check_capture(loss, params, (tokens, y), expected, kernels)
        report = optalr.coverage(loss, params, tokens, y)
    assert set(expected) == set(kernels)
    assert extras["signals"].cell.weight_hh.positions == 4
    assert report[".cell.weight_ih"].view.bias == ".cell.bias"
    assert report[".attention.output_proj.weight"].view.bias == ".attention.output_proj.bias"
    assert report[".embed.weight"].treatment == "diagonal"
    assert "gather" in report[".embed.weight"].reason or "slice" in report[".embed.weight"].reason
    fallbacks = [leaf.path for leaf in report.leaves if leaf.treatment == "diagonal"]
    assert fallbacks == [".embed.weight", ".norm.weight", ".norm.bias", ".cell.bias_n"]


def test_layers_stacked_by_filter_vmap_and_run_by_scan():
    """Equinox's idiom for deep networks."""
    make = lambda key: eqx.nn.Linear(4, 4, key=key)  # noqa: E731
    stack = eqx.filter_vmap(make)(jax.random.split(jax.random.key(0), 3))
    params, static = eqx.partition(stack, eqx.is_inexact_array)
    x, y = standard_normal(1, 6, 4), jnp.arange(6) % 4

    def loss(params, x, y, layer=no_layer):
        if layer is not no_layer:
            h = x
            for i in range(3):
                w, b = params.weight[i], params.bias[i]
                h = jnp.tanh(layer(f"{i}", h, h @ w.T) + b)
            return cross_entropy(h, y)

        def one(x):
            step = lambda h, p: (jnp.tanh(eqx.combine(p, static)(h)), None)  # noqa: E731
            return jax.lax.scan(step, x, params)[0]

        return cross_entropy(jax.vmap(one)(x), y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(loss, params, x, y, num_examples=6)
        extras = check_capture(loss, params, (x, y))
        report = optalr.coverage(loss, params, x, y, strict=True)
    moments = extras["signals"].weight
    for i in range(3):
        inputs, outputs, mean = expected[f"{i}"]
        for got, want in (
            (moments.cols, inputs),
            (moments.rows, outputs),
            (moments.col_mean, mean),
        ):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    view = report[".weight"].view
    assert (view.stack, view.rows, view.cols, view.bias) == ((0,), (1,), (2,), ".bias")
