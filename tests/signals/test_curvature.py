"""Curvature products against dense matrices in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import optalr
from optalr.signals.curvature import gauss_newton_product, hessian_product
from tests.signals.curvature_problem import LOSSES, predict, problem, softmax_loss
from tests.signals.reference import quick_jit


def dense(product, params):
    flat, unravel = ravel_pytree(params)
    column = quick_jit(jax.vmap(lambda e: ravel_pytree(product(unravel(e)))[0], out_axes=1))
    return column(jnp.eye(flat.size, dtype=flat.dtype))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["batch", "batch x time"])
def test_products_equal_the_dense_matrices(loss, shape):
    params, x, y = problem(shape)
    flat, unravel = ravel_pytree(params)
    outputs = predict(params, x)
    J = quick_jit(jax.jacobian(lambda w: predict(unravel(w), x).ravel()))(flat)
    H_L = quick_jit(jax.hessian(lambda z: loss(z.reshape(outputs.shape), y)))(outputs.ravel())
    H = quick_jit(jax.hessian(lambda w: loss(predict(unravel(w), x), y)))(flat)
    G = gauss_newton_product(lambda p: predict(p, x), lambda z: loss(z, y), params)
    hessian = hessian_product(lambda p: loss(predict(p, x), y), params)
    np.testing.assert_allclose(dense(G, params), J.T @ H_L @ J, atol=1e-13)
    np.testing.assert_allclose(dense(hessian, params), H, atol=1e-13)


def test_outputs_may_be_a_pytree_and_aux_is_dropped():
    params, x, y = problem()

    def two_heads(p):
        z = predict(p, x)
        return {"a": z, "b": z[:, :1] ** 2}, {"mean": jnp.mean(z)}

    def loss(z):
        return softmax_loss(z["a"], y) + jnp.sum(z["b"] ** 2)

    product = gauss_newton_product(two_heads, loss, params, has_aux=True)
    v = jax.tree.map(jnp.ones_like, params)
    flat, unravel = ravel_pytree(params)
    z, unravel_z = ravel_pytree(two_heads(params)[0])
    J = quick_jit(jax.jacobian(lambda w: ravel_pytree(two_heads(unravel(w))[0])[0]))(flat)
    H_L = quick_jit(jax.hessian(lambda z: loss(unravel_z(z))))(z)
    got = ravel_pytree(jax.jit(product)(v))[0]
    np.testing.assert_allclose(got, J.T @ H_L @ J @ np.ones(flat.size), rtol=2e-4, atol=1e-5)


class Normed(nn.Module):
    """Batch statistics between two layers."""

    @nn.compact
    def __call__(self, x):
        h = nn.BatchNorm(use_running_average=False)(nn.Dense(5)(x))
        return nn.Dense(3)(jnp.tanh(h))


class Dropped(nn.Module):
    """Dropout between two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.4, deterministic=False)(jnp.tanh(nn.Dense(5)(x))))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("model", [Normed(), Dropped()], ids=["batch norm", "dropout"])
def test_batch_statistics_and_dropout_have_the_dense_products(model):
    _, x, y = problem()
    keys = {"params": jax.random.key(4), "dropout": jax.random.key(5)}
    variables = quick_jit(model.init)(keys, x)
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), variables)
    params = variables["params"]
    stats = {name: value for name, value in variables.items() if name != "params"}

    def apply_model(p, x, y, key):
        variables = {"params": p, **stats}
        return model.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])

    loss = optalr.composite_loss(apply_model, lambda z, x, y, key: softmax_loss(z, y), has_aux=True)
    args = (x, y, jax.random.key(6))
    extras = quick_jit(optalr.value_grad_and_extras(loss, has_aux=True))(params, *args)[2]
    flat, unravel = ravel_pytree(params)
    outputs = apply_model(params, *args)[0]
    J = quick_jit(jax.jacobian(lambda w: apply_model(unravel(w), *args)[0].ravel()))(flat)
    H_L = quick_jit(jax.hessian(lambda z: softmax_loss(z.reshape(outputs.shape), y)))(
        outputs.ravel()
    )
    H = quick_jit(jax.hessian(lambda w: loss(unravel(w), *args)[0]))(flat)
    np.testing.assert_allclose(dense(extras["gauss_newton"], params), J.T @ H_L @ J, atol=1e-12)
    np.testing.assert_allclose(dense(extras["hessian"], params), H, atol=1e-12)
    if isinstance(model, Dropped):
        other = apply_model(params, x, y, jax.random.key(7))[0]
        assert not np.allclose(other, outputs), "dropout is off"


def test_outputs_that_are_not_floating_are_named():
    params, x, y = problem()

    def model(p, x, y):
        z = predict(p, x)
        return {"scores": z, "label": jnp.argmax(z, axis=-1)}

    loss = optalr.composite_loss(model, lambda z, x, y: softmax_loss(z["scores"], y))
    evaluate = optalr.value_grad_and_extras(loss)
    with pytest.raises(TypeError, match=r"predict_fn's outputs\['label'\].*aux"):
        jax.eval_shape(lambda p: evaluate(p, x, y)[2]["gauss_newton"](p), params)


def test_a_plain_loss_with_aux_has_products():
    params, x, y = problem()

    def loss(p, x, y):
        z = predict(p, x)
        return softmax_loss(z, y), z

    found = optalr.curvature_products(loss, params, x, y, has_aux=True)["hessian"](params)
    expected = hessian_product(lambda p: loss(p, x, y)[0], params)(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_products_cross_jit_without_retracing():
    params, x, y = problem()
    traces = []

    def bound_loss(x, y, p):
        return softmax_loss(predict(p, x), y)

    @jax.jit
    def use(product, v):
        traces.append(1)
        return product(v)

    v = jax.tree.map(jnp.ones_like, params)
    for scale in (1.0, 2.0):
        use(hessian_product(Partial(bound_loss, x * scale, y), params), v)
    assert len(traces) == 1
    traces.clear()
    for scale in (1.0, 2.0):
        use(gauss_newton_product(Partial(apply, x), Partial(cross_entropy, y * scale), params), v)
    assert len(traces) == 1


def apply(x, p):
    return predict(p, x)


def cross_entropy(y, z):
    return softmax_loss(z, y)


def test_direction_is_cast_to_the_parameters_dtype():
    params, x, y = problem()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    product = gauss_newton_product(Partial(apply, x), Partial(cross_entropy, y), half)
    v = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.float32), params)
    out = product(v)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    exact = gauss_newton_product(Partial(apply, x), Partial(cross_entropy, y), params)(v)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.05 * float(jnp.abs(b).max()))


def test_one_linearization_serves_gradient_and_products():
    """Flops of gradient + k products: the forward pass is counted once (floor 1 + 4k/3)."""
    params = [
        {"w": jnp.ones((256, 256)), "b": jnp.zeros(256)},
        {"w": jnp.ones((256, 256)), "b": jnp.zeros(256)},
    ]
    x, y = jnp.ones((64, 256)), jnp.ones((64, 256)) / 256

    def net(p):
        return jnp.tanh(x @ p[0]["w"]) @ p[1]["w"]

    def with_products(p, k):
        v = jax.grad(lambda q: softmax_loss(net(q), y))(p)
        for _ in range(k):
            v = gauss_newton_product(net, lambda z: softmax_loss(z, y), p)(v)
        return v

    def flops(k):
        compiled = jax.jit(partial(with_products, k=k)).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    # The gradient of two dense layers takes five matrix products (none for the input's cotangent);
    # a product takes three of the linearized model and three of its transpose.
    assert flops(1) / flops(0) < 1 + 6 / 5 * 1.1
    assert flops(3) / flops(0) < 1 + 3 * 6 / 5 * 1.1
