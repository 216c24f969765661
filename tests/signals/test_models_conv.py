"""Every kind of convolution, captured from Flax linen models as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import optalr
from optalr.signals.tracing import convolutions
from tests.signals.reference import (
    check_capture,
    no_layer,
    random_params,
    reference_moments,
    stack_slice,
    standard_normal,
)
from tests.signals.reference_layers import linen_layer

CONVOLUTIONS = {
    "stride, padding, dilation": nn.Conv(
        4, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1)), kernel_dilation=(1, 2)
    ),
    "no bias": nn.Conv(4, (2, 3), use_bias=False),
    "1-D": nn.Conv(4, (3,), padding=((2, 1),)),
    "3-D": nn.Conv(3, (2, 1, 2), padding="VALID"),
    "groups": nn.Conv(6, (3, 3), feature_group_count=2, strides=2),
    "depthwise": nn.Conv(8, (3, 3), feature_group_count=4),
    "1x1": nn.Conv(5, (1, 1)),
    "transposed": nn.ConvTranspose(3, (3, 2), strides=(2, 1), padding="VALID"),
}


class Net(nn.Module):
    conv: nn.Module

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(self.conv(x))
        return nn.Dense(3)(h.reshape(h.shape[0], -1))


def loss_of(model):
    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            logits = model.apply({"params": params}, x)
        else:
            with linen_layer(layer):
                logits = model.apply({"params": params}, x)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1))

    return loss


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    conv = CONVOLUTIONS[name]
    shape = {1: (9,), 2: (6, 5), 3: (4, 3, 3)}[len(conv.kernel_size)]
    x, y = standard_normal(1, 5, *shape, 4), jnp.arange(5) % 3
    model = Net(conv)
    params = random_params(model.init, jax.random.key(0), x)["params"]
    loss = loss_of(model)
    expected = reference_moments(loss, params, x, y, num_examples=5)
    extras = check_capture(loss, params, (x, y), expected)
    report = optalr.coverage(loss, params, x, y, strict=True)
    kernel = report["['conv']['kernel']"]
    rank = len(shape) + 2
    assert kernel.view.rows == tuple(range(rank - 1))
    assert kernel.view.cols == (rank - 1,)
    moments = extras["signals"]["conv"]["kernel"]
    assert moments.count == 5
    if conv.use_bias:
        assert moments.bias == kernel.view.bias == "['conv']['bias']"


def test_patches_laid_out_in_pieces_give_the_same_moments(monkeypatch):
    x, y = standard_normal(1, 5, 6, 5, 4), jnp.arange(5) % 3
    model = Net(CONVOLUTIONS["groups"])
    params = random_params(model.init, jax.random.key(0), x)["params"]

    def signals():
        return jax.jit(optalr.value_grad_and_extras(loss_of(model)))(params, x, y)[2]["signals"]

    whole = signals()
    monkeypatch.setattr(convolutions, "PIECE", 100)
    pieces = signals()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, pieces)


def test_pieces_of_patches_share_their_memory(monkeypatch):
    x, w = jnp.ones((16, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
    numbers = ("NHWC", "HWIO", "NHWC")

    def loss(w, x):
        h = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.mean(h**2)

    def scratch():
        evaluate = optalr.value_grad_and_extras(loss)
        compiled = jax.jit(lambda w, x: evaluate(w, x)[2]["signals"]).lower(w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    patches = x.size * 9 * 4
    whole = scratch()
    monkeypatch.setattr(convolutions, "PIECE", x.size)
    monkeypatch.setattr(convolutions, "MOST_PIECES", 8)
    assert scratch() < whole - patches / 2


def test_convolutions_stacked_by_vmap_are_layers_of_their_own():
    """To jax they are one grouped convolution; each has its own input and its own factors."""
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    stack = nn.vmap(nn.Conv, in_axes=0, **lift)(3, (2, 2), padding="VALID")
    x, y = standard_normal(1, 2, 5, 4, 3, 2), None
    params = random_params(stack.init, jax.random.key(0), x)["params"]

    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            out = stack.apply({"params": params}, x)
        else:
            out = []
            for i in range(2):
                one = jax.tree.map(lambda p, i=i: p[i], params)
                with linen_layer(lambda _, *a, i=i: layer(f"{i}", *a)):
                    out.append(nn.Conv(3, (2, 2), padding="VALID").apply({"params": one}, x[i]))
            out = jnp.stack(out)
        return jnp.mean(jnp.sum(jnp.tanh(out), (0, 2, 3, 4)))

    expected = reference_moments(loss, params, x, y, num_examples=5)
    kernels = {
        name: lambda extras, i=int(name): stack_slice(extras["signals"]["kernel"], i)
        for name in expected
    }
    check_capture(loss, params, (x, y), expected, kernels)
    report = optalr.coverage(loss, params, x, y, strict=True)
    view = report["['kernel']"].view
    assert (view.stack, view.rows, view.cols) == ((0,), (1, 2, 3), (4,))
    assert view.bias == "['bias']"
