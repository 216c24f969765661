"""Flax linen models, captured as they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import optalr
from tests.signals.reference import (
    assert_moments,
    check_capture,
    cross_entropy,
    no_layer,
    random_params,
    reference_moments,
    stack_slice,
    standard_normal,
)
from tests.signals.reference_layers import linen_layer


def apply(model, layer, *args, **kwargs):
    """Apply a model, intercepted where the reference asks for it."""
    if layer is no_layer:
        return model.apply(*args, **kwargs)
    with linen_layer(layer):
        return model.apply(*args, **kwargs)


class Normed(nn.Module):
    """Convolution, batch statistics, dropout, layer norm, and a layer that is used twice."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (3, 3), use_bias=False)(x)
        h = nn.BatchNorm(use_running_average=False)(h)
        h = nn.Dropout(0.3, deterministic=False)(nn.relu(h)).reshape(x.shape[0], -1)
        h = nn.LayerNorm()(nn.Dense(6)(h))
        twice = nn.Dense(6, name="twice")
        h = twice(jnp.tanh(twice(h)))
        return nn.Dense(3)(h)


def test_batch_statistics_dropout_norms_and_a_layer_used_twice():
    x, y = standard_normal(1, 8, 5, 4, 2), jnp.arange(8) % 3
    key, model = jax.random.key(2), Normed()
    variables = random_params(model.init, {"params": key, "dropout": key}, x)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, x, y, layer=no_layer):
        logits, new = apply(
            model,
            layer,
            {"params": params, "batch_stats": stats},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, y), new

    expected = reference_moments(lambda *a: loss(*a)[0], params, x, y, num_examples=8)
    extras = check_capture(loss, params, (x, y), expected, has_aux=True)
    signals = extras["signals"]
    assert signals["twice"]["kernel"].positions == 2
    assert signals["twice"]["kernel"].bias == "['twice']['bias']"
    assert_moments(extras["head"], expected["Dense_1"])
    report = optalr.coverage(loss, params, x, y)
    fallbacks = {leaf.path: leaf.reason for leaf in report.leaves if leaf.treatment == "diagonal"}
    assert fallbacks == {
        "['BatchNorm_0']['bias']": "used by add",
        "['BatchNorm_0']['scale']": "used by mul",
        "['LayerNorm_0']['bias']": "used by add",
        "['LayerNorm_0']['scale']": "used by mul",
    }


class Block(nn.Module):
    """A transformer block, pre-norm."""

    @nn.compact
    def __call__(self, h):
        a = nn.LayerNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="attention")(a)
        m = nn.LayerNorm()(h)
        return h + nn.Dense(4, name="down")(nn.gelu(nn.Dense(8, name="up")(m)))


class Transformer(nn.Module):
    """Token and position embeddings, one block, and an output tied to the token embedding."""

    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        position = self.param("position", nn.initializers.normal(), (tokens.shape[1], 4))
        h = self.block(name="block")(embed(tokens) + position[None])
        return embed.attend(nn.LayerNorm(name="norm")(h))


def test_transformer_with_remat_and_a_tied_embedding():
    tokens = jax.random.randint(jax.random.key(1), (6, 5), 0, 7)
    labels = jnp.roll(tokens, -1, axis=1)
    plain, model = Transformer(), Transformer(nn.remat(Block))
    params = random_params(plain.init, jax.random.key(0), tokens)["params"]

    def loss(params, x, y, layer=no_layer):
        chosen = model if layer is no_layer else plain
        return cross_entropy(apply(chosen, layer, {"params": params}, x), y)

    expected = reference_moments(loss, params, tokens, labels, num_examples=6)
    kernels = {name: f"{name}/kernel" for name in expected} | {"embed": "embed/embedding"}
    assert len(kernels) == 7
    extras = check_capture(loss, params, (tokens, labels), expected, kernels)
    report = optalr.coverage(loss, params, tokens, labels)
    attention = "['block']['attention']"
    query, out = report[f"{attention}['query']['kernel']"], report[f"{attention}['out']['kernel']"]
    assert (query.view.rows, query.view.cols) == ((0,), (1, 2))
    assert (out.view.rows, out.view.cols) == ((0, 1), (2,))
    assert query.view.bias == f"{attention}['query']['bias']"
    embedding = report["['embed']['embedding']"]
    assert embedding.treatment == "kronecker"
    assert embedding.view.input_side == "cols"
    assert embedding.reason == "not in the moments: read by a table lookup (gather)"
    assert report["['position']"].treatment == "diagonal"
    assert extras["signals"]["block"]["up"]["kernel"].positions == 5
    assert extras["signals"]["block"]["up"]["kernel"].count == 6


def test_an_embedding_that_is_only_looked_up_is_diagonal_and_says_so():
    tokens = jnp.arange(6).reshape(3, 2)
    model = nn.Sequential([nn.Embed(7, 4), nn.Dense(3)])
    params = random_params(model.init, jax.random.key(0), tokens)["params"]
    loss = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)  # noqa: E731
    report = optalr.coverage(loss, params, tokens)
    embedding = report["['layers_0']['embedding']"]
    assert embedding.treatment == "diagonal"
    assert embedding.reason == "read by a table lookup (gather)"
    with pytest.raises(ValueError, match="table lookup"):
        optalr.coverage(loss, params, tokens, strict=True)


@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell", "GRUCell"])
def test_recurrent_cells_under_scan(cell):
    x, y = standard_normal(1, 6, 4, 3), jnp.arange(6) % 5
    model = nn.RNN(getattr(nn, cell)(5))
    params = random_params(model.init, jax.random.key(0), x)["params"]
    # The optimized cell concatenates its kernels; its parameters are the plain cell's.
    plain = getattr(nn, cell.removeprefix("Optimized"))(5, parent=None)

    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            return cross_entropy(model.apply({"params": params}, x)[:, -1], y)
        carry = jax.tree.map(jnp.zeros_like, plain.initialize_carry(jax.random.key(0), (6, 3)))
        h = None
        for t in range(x.shape[1]):
            carry, h = apply(plain, layer, {"params": params["cell"]}, carry, x[:, t])
        return cross_entropy(h, y)

    expected = reference_moments(loss, params, x, y, num_examples=6)
    kernels = {name: f"cell/{name}/kernel" for name in expected}
    assert len(kernels) == (6 if cell == "GRUCell" else 8)
    # Beside the moments XLA fuses the sum over examples of one bias differently: one ulp.
    ulp = 1e-6 if cell == "OptimizedLSTMCell" else 0.0
    extras = check_capture(loss, params, (x, y), expected, kernels, gradient_rtol=ulp)
    biased = "hn" if cell == "GRUCell" else "hi"
    moments = extras["signals"]["cell"][biased]["kernel"]
    assert moments.bias == f"['cell']['{biased}']['bias']"
    assert moments.positions == 4
    optalr.coverage(loss, params, x, y, strict=True)


class Layer(nn.Module):
    """A residual layer as ``nn.scan`` wants it."""

    @nn.compact
    def __call__(self, h, _):
        return h + jnp.tanh(nn.Dense(4)(h)), None


def test_layers_stacked_by_scan_and_by_vmap():
    x, y = standard_normal(1, 6, 4), jnp.arange(6) % 4
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    deep = nn.scan(nn.remat(Layer), length=3, **lift)()
    wide = nn.vmap(nn.Dense, in_axes=0, **lift)(4)
    params = {
        "deep": random_params(deep.init, jax.random.key(0), x, None)["params"],
        "wide": random_params(wide.init, jax.random.key(0), jnp.stack([x, x]), seed=1)["params"],
    }

    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            h, _ = deep.apply({"params": params["deep"]}, x, None)
            logits = wide.apply({"params": params["wide"]}, jnp.stack([h, 2 * h]))
        else:
            h = x
            for i in range(3):
                one = jax.tree.map(lambda p, i=i: p[i], params["deep"])
                named = lambda _, *a, i=i: layer(f"deep{i}", *a)  # noqa: E731
                h, _ = apply(Layer(), named, {"params": one}, h, None)
            logits = []
            for i in range(2):
                w, b = params["wide"]["kernel"][i], params["wide"]["bias"][i]
                logits.append(layer(f"wide{i}", (i + 1) * h, (i + 1) * h @ w + b[None]))
        return sum(cross_entropy(z, y) for z in logits)

    expected = reference_moments(loss, params, x, y, num_examples=6)
    kernels = {}
    for name in expected:
        path = "deep/Dense_0" if name.startswith("deep") else "wide"
        kernels[name] = partial(_slice, path.split("/"), int(name[-1]))
    extras = check_capture(loss, params, (x, y), expected, kernels)
    report = optalr.coverage(loss, params, x, y, strict=True)
    for path in ("['deep']['Dense_0']['kernel']", "['wide']['kernel']"):
        assert report[path].view.stack == (0,)
    assert extras["signals"]["wide"]["kernel"].bias == "['wide']['bias']"
    assert extras["signals"]["deep"]["Dense_0"]["kernel"].positions == 1


def _slice(path, index, extras):
    tree = extras["signals"]
    for part in path:
        tree = tree[part]
    return stack_slice(tree["kernel"], index)


def test_mixed_precision():
    """bf16 compute, f32 parameters: factors in float32, of the bf16 signals as they are."""
    x, y = standard_normal(1, 16, 6, 6, 2), jnp.arange(16) % 3

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Conv(4, (3, 3), strides=2, dtype=jnp.bfloat16)(x))
            return nn.Dense(3, dtype=jnp.bfloat16)(h.reshape(h.shape[0], -1))

    model = Net()
    params = random_params(model.init, jax.random.key(0), x)["params"]

    def loss(params, x, y, layer=no_layer):
        logits = apply(model, layer, {"params": params}, x)
        return cross_entropy(logits.astype(jnp.float32), y)

    expected = reference_moments(loss, params, x, y, num_examples=16, dtype=None)
    extras = check_capture(loss, params, (x, y), expected, rtol=2e-2)
    moments = extras["signals"]["Conv_0"]["kernel"]
    assert moments.rows.dtype == moments.cols.dtype == jnp.float32
    assert moments.bias == "['Conv_0']['bias']"
    # The first layer's inputs know no rounding but their own.
    largest = np.abs(expected["Conv_0"][0]).max()
    np.testing.assert_allclose(moments.rows, expected["Conv_0"][0], rtol=1e-5, atol=1e-5 * largest)
