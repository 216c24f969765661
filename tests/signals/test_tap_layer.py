"""The escape hatch: layers that the user declares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from tests.signals.reference import assert_moments, check_capture, no_layer, reference_moments
from tests.signals.test_models_bare import normal, opaque


def test_hand_taps_of_an_opaque_a_normalized_and_a_transposed_kernel():
    def loss(params, x, y, layer=no_layer):
        h = layer("opaque", x, opaque(x, params["opaque"]))
        h = optalr.tap_layer(h, x, params["opaque"])
        h = jnp.tanh(h + params["b"][None])
        w = params["normed"] / jnp.linalg.norm(params["normed"])
        s = layer("normed", h, h @ w)
        h = optalr.tap_layer(s, h, params["normed"])
        s = layer("turned", h, h @ jnp.sin(params["turned"]).T)
        s = optalr.tap_layer(s, h, params["turned"], input_side="cols")
        return jnp.mean(jnp.sum((s - y) ** 2, 1))

    params = {"opaque": normal(0, 4, 3), "normed": normal(1, 3, 5), "turned": normal(2, 5, 5)}
    params["b"] = normal(3, 3)
    x, y = normal(4, 6, 4), normal(5, 6, 5)
    expected = reference_moments(loss, params, x, y, num_examples=6)
    extras = check_capture(loss, params, (x, y), expected, {name: name for name in expected})
    report = optalr.coverage(loss, params, x, y, strict=True)
    assert report["['opaque']"].view.bias == "['b']"
    assert report["['opaque']"].reason == ""
    assert report["['turned']"].view.input_side == "cols"
    assert_moments(extras["head"], expected["turned"])


def test_a_hand_tap_under_vmap_and_scan_stands_in_place_of_what_was_found():
    def loss(params, x, y, layer=no_layer):
        def one(x):
            def step(carry, row):
                s = params["w"] @ row  # what the tracer finds, were it not for the tap
                return carry, optalr.tap_layer(2 * s, 3 * row, params["w"])

            return jax.lax.scan(step, 0.0, x)[1]

        if layer is no_layer:
            out = jax.vmap(one)(x)
        else:
            out = layer("w", 3 * x, 2 * jnp.einsum("nti,oi->nto", x, params["w"]))
        return jnp.mean(jnp.sum((out - y) ** 2, (1, 2)))

    params, x, y = {"w": normal(0, 2, 4)}, normal(1, 5, 3, 4), normal(2, 5, 3, 2)
    expected = reference_moments(loss, params, x, y, num_examples=5)
    extras = check_capture(loss, params, (x, y), expected, {"w": "w"})
    assert (extras["signals"]["w"].count, extras["signals"]["w"].positions) == (5, 3)


def test_it_is_the_identity_where_nothing_is_captured():
    x, w = normal(0, 4, 3), normal(1, 3, 2)
    tapped = lambda w: jnp.sum(optalr.tap_layer(x @ w, x, w) ** 2)  # noqa: E731
    plain = lambda w: jnp.sum((x @ w) ** 2)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(tapped)(w), jax.grad(plain)(w))
    np.testing.assert_array_equal(jax.jit(jax.hessian(tapped))(w), jax.jit(jax.hessian(plain))(w))


def test_bad_shapes_are_named():
    x, w = normal(0, 4, 3), normal(1, 3, 2)
    with pytest.raises(ValueError, match="outputs and inputs must agree"):
        optalr.tap_layer(x @ w, x[:2], w)
    with pytest.raises(ValueError, match=r"kernel of shape \(3, 3\) has no split"):
        optalr.tap_layer(x @ w, x, jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="input_side='cols'"):
        optalr.tap_layer(x @ w, x, w, input_side="cols")
    with pytest.raises(ValueError, match="input_side must be"):
        optalr.tap_layer(x @ w, x, w, input_side="left")
