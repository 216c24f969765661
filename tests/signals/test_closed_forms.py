"""Closed forms of the output loss's Hessian against differentiating the output loss twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.signals.composite import sigmoid_product, softmax_product, squared_error_product
from optalr.signals.curvature import gauss_newton_product, output_hessian_product
from tests.signals.curvature_problem import (
    predict,
    problem,
    sigmoid_loss,
    softmax_loss,
    squared_loss,
)
from tests.signals.reference import quick_jit, standard_normal


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("loss", "product", "scale"),
    [
        (softmax_loss, softmax_product, 1 / 6),
        (squared_loss, squared_error_product, 1 / 2),
        (sigmoid_loss, sigmoid_product, 1 / 18),
    ],
)
def test_closed_forms_equal_differentiation(loss, product, scale):
    params, x, y = problem((2, 3))
    outputs = 5 * predict(params, x)
    u = standard_normal(3, *outputs.shape)
    differentiate = partial(output_hessian_product, lambda z: loss(z, y))
    expected = quick_jit(differentiate)(outputs, u)
    np.testing.assert_allclose(product(outputs, u, scale=scale), expected, atol=1e-15)
    by_hand = gauss_newton_product(
        lambda p: predict(p, x),
        lambda z: loss(z, y),
        params,
        output_product=partial(product, scale=scale),
    )
    differentiated = gauss_newton_product(lambda p: predict(p, x), lambda z: loss(z, y), params)
    v = jax.tree.map(jnp.cos, params)
    found, expected = (quick_jit(product)(v) for product in (by_hand, differentiated))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-14), found, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize(
    ("loss", "closed_form", "scale"),
    [
        (softmax_loss, optalr.softmax_product, lambda z: 1 / z.shape[0]),
        (squared_loss, optalr.squared_error_product, lambda z: 1 / z.shape[0]),
        (sigmoid_loss, optalr.sigmoid_product, lambda z: 1 / z.size),
    ],
    ids=["softmax", "squared", "sigmoid"],
)
def test_a_composite_loss_takes_a_closed_form(loss, closed_form, scale, has_aux):
    params, x, y = problem()
    calls = []

    def model(p, x, y):
        return (predict(p, x), x) if has_aux else predict(p, x)

    def output_product(z, u, x, y):
        calls.append(y)
        return closed_form(z, u, scale=scale(z))

    def make(**options):
        return optalr.composite_loss(model, lambda z, x, y: loss(z, y), has_aux=has_aux, **options)

    v = jax.tree.map(jnp.cos, params)

    def product_of(loss):
        evaluate = quick_jit(optalr.value_grad_and_extras(loss, has_aux=has_aux))
        return evaluate(params, x, y)[2]["gauss_newton"]

    def apply(product):  # compiled anew each time, so that each product is seen to call the form
        return quick_jit(lambda product, v: product(v))(product, v)

    expected = apply(product_of(make()))
    by_hand = make(output_product=output_product)
    found = [
        product_of(by_hand),
        optalr.curvature_products(by_hand, params, x, y)["gauss_newton"],
    ]
    if not has_aux:
        chunked = optalr.full_batch(by_hand, chunk_size=4)
        found.append(quick_jit(chunked)(params, x, y)[2]["gauss_newton"])
    for product in found:
        calls.clear()
        got = apply(product)
        assert calls
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-14), got, expected)


def test_closed_forms_survive_extreme_scores():
    outputs = jnp.array([[1e4, -1e4, 0.0]])
    u = jnp.ones((1, 3))
    for product in (softmax_product, sigmoid_product):
        assert bool(jnp.all(jnp.isfinite(product(outputs, u))))
    # Far from the threshold 1 − σ would round to zero.
    assert float(sigmoid_product(jnp.array([20.0]), jnp.ones(1))[0]) == pytest.approx(np.exp(-20.0))


def test_weights_mask_padded_positions():
    _, x, y = problem((2, 3))
    outputs = x[..., :3]
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])[..., None]

    def masked_loss(z):
        return -jnp.sum(mask * y * jax.nn.log_softmax(z)) / 3

    u = jnp.sin(outputs)
    np.testing.assert_allclose(
        softmax_product(outputs, u, scale=mask / 3),
        jax.jit(partial(output_hessian_product, masked_loss))(outputs, u),
        atol=1e-7,
    )
