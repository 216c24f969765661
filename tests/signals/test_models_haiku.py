"""Haiku models: dictionaries of ``w`` and ``b``, a cell that splits its kernel."""

import haiku as hk
import jax
import jax.numpy as jnp

import optalr
from tests.signals.reference import (
    check_capture,
    cross_entropy,
    no_layer,
    random_params,
    reference_moments,
    standard_normal,
)
from tests.signals.reference_layers import conv_patches


def test_convolution_batch_norm_dropout_and_linear():
    def network(x):
        h = hk.Conv2D(4, 3, stride=2, name="conv")(x)
        h = hk.BatchNorm(True, True, 0.9, name="norm")(h, is_training=True)
        h = hk.dropout(hk.next_rng_key(), 0.25, jax.nn.relu(h)).reshape(x.shape[0], -1)
        return hk.Linear(3, name="out")(hk.remat(hk.Linear(5, name="hidden"))(h))

    model = hk.transform_with_state(network)
    x, y = standard_normal(1, 6, 5, 5, 2), jnp.arange(6) % 3
    key = jax.random.key(2)
    params, state = random_params(model.init, key, x)

    def loss(params, x, y):
        logits, new = model.apply(params, state, key, x)
        return cross_entropy(logits, y), new

    def reference(params, x, y, layer):
        p = params["conv"]
        h = jax.lax.conv_general_dilated(
            x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = layer("conv", conv_patches(x, (3, 3), (2, 2), "SAME"), h) + p["b"]
        h = (h - h.mean((0, 1, 2))) / jnp.sqrt(h.var((0, 1, 2)) + 1e-5)
        h = h * params["norm"]["scale"] + params["norm"]["offset"]
        mask = jax.random.bernoulli(next(hk.PRNGSequence(key)), jnp.float32(0.75), h.shape)
        h = (jax.nn.relu(h) * mask / 0.75).reshape(x.shape[0], -1)
        for name in ("hidden", "out"):
            h = layer(name, h, h @ params[name]["w"]) + params[name]["b"]
        return cross_entropy(h, y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(reference, params, x, y, num_examples=6)
        kernels = {name: f"{name}/w" for name in expected}
        extras = check_capture(loss, params, (x, y), expected, kernels, has_aux=True)
        report = optalr.coverage(loss, params, x, y)
    assert extras["signals"]["conv"]["w"].bias == "['conv']['b']"
    assert extras["signals"]["out"]["w"].bias == "['out']['b']"
    fallbacks = [leaf.path for leaf in report.leaves if leaf.treatment == "diagonal"]
    assert fallbacks == ["['norm']['offset']", "['norm']['scale']"]


def test_recurrent_cells_and_attention():
    def network(x):
        h = hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal(), name="attention")(
            x, x, x
        )
        lstm, gru = hk.LSTM(3, name="lstm"), hk.GRU(3, name="gru")
        h, _ = hk.dynamic_unroll(lstm, h, lstm.initial_state(x.shape[0]), time_major=False)
        h, _ = hk.dynamic_unroll(gru, h, gru.initial_state(x.shape[0]), time_major=False)
        return h[:, -1]

    model = hk.without_apply_rng(hk.transform(network))
    x, y = standard_normal(1, 6, 4, 3), jnp.arange(6) % 3
    params = random_params(model.init, jax.random.key(0), x)

    def loss(params, x, y, layer=no_layer):
        return cross_entropy(model.apply(params, x), y)

    def reference(params, x, y, layer):
        def dense(name, x):
            p = params[name]
            return layer(name, x, x @ p["w"]) + p["b"]

        q, k, v = (
            dense(f"attention/{n}", x).reshape(6, 4, 2, 2) for n in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k) / jnp.sqrt(2.0))
        mixed = jnp.einsum("nhts,nshk->nthk", weights, v).reshape(6, 4, 4)
        h = dense("attention/linear", mixed)
        hidden = cell = jnp.zeros((6, 3), h.dtype)
        rows = []
        for t in range(4):
            i, g, f, o = jnp.split(
                dense("lstm/linear", jnp.concatenate([h[:, t], hidden], -1)), 4, -1
            )
            cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            rows.append(hidden)
        p, state = params["gru"], jnp.zeros((6, 3), h.dtype)
        for row in rows:
            gates = layer("gru/w_i", row, row @ p["w_i"])
            zr, a = gates[:, :6], gates[:, 6:]
            from_state = layer("gru/w_h", state, state @ p["w_h"])[:, :6]
            z, r = jnp.split(jax.nn.sigmoid(zr + from_state + p["b"][:6]), 2, -1)
            from_reset = layer("gru/w_h", r * state, (r * state) @ p["w_h"])[:, 6:]
            a = jnp.tanh(a + from_reset + p["b"][6:])
            state = (1 - z) * state + z * a
        return cross_entropy(state, y)

    with jax.numpy_rank_promotion("allow"):
        expected = reference_moments(reference, params, x, y, num_examples=6)
        kernels = {n: (lambda e, n=n: e["signals"][n]["w"]) for n in expected if "gru" not in n}
        kernels["gru/w_i"] = lambda e: e["signals"]["gru"]["w_i"]
        kernels["gru/w_h"] = lambda e: e["signals"]["gru"]["w_h"]
        extras = check_capture(loss, params, (x, y), expected, kernels)
        report = optalr.coverage(loss, params, x, y)
    assert extras["signals"]["lstm/linear"]["w"].positions == 4
    assert extras["signals"]["gru"]["w_h"].positions == 8  # two parts, four steps
    fallbacks = [leaf.path for leaf in report.leaves if leaf.treatment == "diagonal"]
    assert fallbacks == ["['gru']['b']"]
