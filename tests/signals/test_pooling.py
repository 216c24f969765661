"""Max pooling with the light derivative, against jax's own and dense matrices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.signals.curvature import gauss_newton_product, hessian_product
from optalr.signals.pooling import with_light_pooling
from tests.signals.reference import quick_jit

WINDOWS = {
    "two by two": ((2, 2), (2, 2), "VALID"),
    "overlapping, padded": ((3, 3), (2, 2), "SAME"),
    "every place": ((2, 2), (1, 1), "VALID"),
    "rows left over": ((3, 2), (3, 2), "VALID"),
    "padded on one side": ((2, 2), (1, 2), ((0, 0), (1, 0), (0, 1), (0, 0))),
}
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)


def pool(x, window):
    size, strides, padding = window
    size, strides = (1, *size, 1), (1, *strides, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, strides, padding)


def image(seed, levels=None):
    x = np.random.default_rng(seed).standard_normal((2, 7, 8, 3)).astype(np.float32)
    # Few levels: every window holds the same largest entry more than once.
    return jnp.asarray(x if levels is None else np.round(x * levels) / levels)


@every_window
@pytest.mark.parametrize("levels", [None, 1])
def test_values_and_derivatives_are_those_of_the_pooling(window, levels):
    x, dx = image(0, levels), image(1)

    def plain(x):
        return pool(x, window)

    light = with_light_pooling(plain)
    expected, pull = jax.vjp(plain, x)
    found, light_pull = jax.vjp(light, x)
    np.testing.assert_array_equal(found, expected)
    cotangent = jnp.arange(expected.size, dtype=jnp.float32).reshape(expected.shape)
    pulled = light_pull(cotangent)[0]
    np.testing.assert_array_equal(pulled, pull(cotangent)[0])  # of equal entries the first counts
    pushed = jax.jvp(light, (x,), (dx,))[1]
    np.testing.assert_allclose(jnp.vdot(pulled, dx), jnp.vdot(cotangent, pushed), rtol=1e-4)
    if levels is None:  # where entries are equal jax's own two directions can disagree
        np.testing.assert_array_equal(pushed, jax.jvp(plain, (x,), (dx,))[1])


def smooth_loss(w, x, window):
    return jnp.sum(jnp.tanh(pool(jnp.sin(x * w.reshape(1, 1, 1, 3)), window)) ** 2)


def dense_hessian(w, x, window):
    return jax.hessian(lambda w: smooth_loss(w, x, window))(w)


@every_window
def test_products_through_a_pooling_equal_the_dense_ones(x64, window):
    x, w = jnp.asarray(image(0), jnp.float64), jnp.array([0.7, -1.2, 0.4])
    v = jnp.array([1.0, 2.0, -0.5])
    product = hessian_product(lambda w: smooth_loss(w, x, window), w)
    expected = quick_jit(partial(dense_hessian, window=window))(w, x) @ v
    np.testing.assert_allclose(quick_jit(product)(v), expected, rtol=1e-10)

    def predict(w):
        return jax.jit(lambda w: pool(jnp.sin(x * w.reshape(1, 1, 1, 3)), window))(w)

    product = gauss_newton_product(predict, lambda z: jnp.sum(z**4), w)
    jacobian = np.asarray(quick_jit(jax.jacobian(predict))(w)).reshape(-1, 3)
    curvature = 12 * np.asarray(quick_jit(predict)(w)).reshape(-1) ** 2
    expected = jacobian.T @ (curvature * (jacobian @ np.asarray(v)))
    np.testing.assert_allclose(quick_jit(product)(v), expected, rtol=1e-10)


def test_batched_by_vmap_and_compiled():
    window, x = WINDOWS["overlapping, padded"], jnp.stack([image(0), image(1)])

    def gradient(function):
        return jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(function(x) ** 2))))(x)

    def plain(x):
        return pool(x, window)

    np.testing.assert_allclose(gradient(with_light_pooling(plain)), gradient(plain), rtol=1e-6)


@pytest.mark.parametrize("under", ["jit", "nothing"])
def test_the_rest_of_the_function_stays(under):
    def function(x, y):
        a, b = jnp.sin(x), y["two"] * 2.0
        first = pool(a, WINDOWS["two by two"])
        return {"z": pool(first * b, WINDOWS["every place"]), "b": b, "x": x}

    wrapped = with_light_pooling(jax.jit(function) if under == "jit" else function)
    args = image(0), {"two": jnp.float32(2.0)}
    jax.tree.map(np.testing.assert_array_equal, wrapped(*args), function(*args))


def test_what_is_not_replaced_still_works():
    x = image(0)

    def whole(x):  # a window of 56 entries
        return pool(x, ((7, 8), (1, 1), "VALID"))

    def in_a_loop(x):
        return jax.lax.fori_loop(0, 2, lambda _, x: x + pool(x, ((3, 3), (1, 1), "SAME")), x)

    for function in (whole, in_a_loop, jnp.sin):
        found = jax.jvp(with_light_pooling(function), (x,), (x,))
        jax.tree.map(np.testing.assert_array_equal, found, jax.jvp(function, (x,), (x,)))
    whole_numbers = jnp.arange(32).reshape(1, 4, 8, 1)
    expected = jnp.array([9, 11, 13, 15, 25, 27, 29, 31]).reshape(1, 2, 4, 1)

    def integers(x):
        lowest = jnp.iinfo(jnp.int32).min
        sizes = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, lowest, jax.lax.max, sizes, sizes, "VALID")

    np.testing.assert_array_equal(with_light_pooling(integers)(whole_numbers), expected)


def test_nothing_of_the_input_s_size_is_kept_for_every_product():
    rows = 64
    x = jnp.ones((8, rows, rows, 8))
    w = jnp.ones((3, 3, 8, 8))

    def predict(w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions)
        return pool(jax.nn.relu(z), WINDOWS["two by two"])

    def temporary(num_products):
        def run(w):
            product = gauss_newton_product(predict, lambda z: jnp.sum(z**2), w)
            for _ in range(num_products):
                w = product(w)
            return w

        return jax.jit(run).lower(w).compile().memory_analysis().temp_size_in_bytes

    assert temporary(6) - temporary(2) < x.nbytes
