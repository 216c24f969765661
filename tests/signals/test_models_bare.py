"""Bare JAX: einsum kernels and every transformation a layer may sit under."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from tests.signals.reference import check_capture, no_layer, reference_moments, standard_normal


def normal(seed, *shape):
    return 0.5 * standard_normal(seed, *shape)


def test_einsum_kernels_of_rank_three_inner_jit_and_vmap_over_examples():
    """A hand-written attention for one example, vmapped; its output projection under jit."""

    def attention(params, x, layer):
        q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in "qkv")
        q, k, v = (
            layer(n, x, s.reshape(s.shape[0], -1)).reshape(s.shape)
            for n, s in zip("qkv", (q, k, v), strict=True)
        )
        weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
        mixed = jnp.einsum("hts,shk->thk", weights, v)
        project = jax.jit(lambda m, o: jnp.einsum("hko,thk->to", o, m))
        return layer("o", mixed.reshape(mixed.shape[0], -1), project(mixed, params["o"]))

    def loss(params, x, y, layer=no_layer):
        if layer is no_layer:
            out = jax.vmap(lambda one: attention(params, one, no_layer))(x)
        else:
            out = jnp.stack([attention(params, one, layer) for one in x])
        return jnp.mean(jnp.sum((out + params["b"][None, None] - y) ** 2, (1, 2)))

    params = {name: normal(i, 3, 2, 2) for i, name in enumerate("qkv")}
    params |= {"o": normal(4, 2, 2, 4), "b": normal(5, 4)}
    x, y = normal(6, 5, 3, 3), normal(7, 5, 3, 4)
    expected = reference_moments(loss, params, x, y, num_examples=5)
    extras = check_capture(loss, params, (x, y), expected, {name: name for name in expected})
    for moments in extras["signals"].values():
        assert moments is None or (moments.count, moments.positions) == (5, 3)
    assert extras["signals"]["o"].bias == "['b']"
    report = optalr.coverage(loss, params, x, y, strict=True)
    assert (report["['q']"].view.rows, report["['q']"].view.cols) == ((0,), (1, 2))
    assert (report["['o']"].view.rows, report["['o']"].view.cols) == ((0, 1), (2,))


@jax.custom_jvp
def halved(x, w, b):
    """A layer whose derivative is not its function's: half of it."""
    return jnp.tanh(x @ w + b[None])


@halved.defjvp
def _(primals, tangents):
    x, w, b = primals
    out = halved(x, w, b)
    dx, dw, db = tangents
    return out, 0.5 * (1 - out**2) * (dx @ w + x @ dw + db[None])


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, c: (c @ r[1].T, r[0].T @ c))


@jax.custom_vjp
def clipped(x):
    """A custom_vjp that holds no parameter."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, c: (jnp.clip(c, -1e-2, 1e-2),))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_custom_derivatives(wrap):
    def loss(params, x, y, layer=no_layer):
        w, b = params["halved"], params["b"]
        if layer is no_layer:
            h = halved(x, w, b)
        else:  # the user's derivative, by hand: scale what goes back to the product
            s = layer("halved", x, x @ w) + b[None]
            h = jnp.tanh(0.5 * s + jax.lax.stop_gradient(0.5 * s))
        h = clipped(layer("inner", h, h @ params["inner"]))
        h = opaque(jax.nn.relu(h), params["opaque"])
        return jnp.mean(jnp.sum((layer("out", h, h @ params["out"]) - y) ** 2, 1))

    params = {name: normal(i, 4, 4) for i, name in enumerate(["halved", "inner", "opaque", "out"])}
    params["b"] = normal(5, 4)
    x, y = normal(6, 8, 4), normal(7, 8, 4)
    value, grads, extras = wrap(optalr.value_grad_and_extras(loss))(params, x, y)
    plain = wrap(jax.value_and_grad(loss))(params, x, y)
    jax.tree.map(np.testing.assert_array_equal, (value, grads), plain)
    expected = reference_moments(loss, params, x, y, num_examples=8)
    for name in ("halved", "inner", "out"):
        moments = extras["signals"][name]
        np.testing.assert_allclose(moments.rows, expected[name][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments.cols, expected[name][1], rtol=1e-5, atol=1e-6)
    report = optalr.coverage(loss, params, x, y)
    assert report["['halved']"].view.bias == "['b']"
    assert report["['opaque']"].treatment == "diagonal"
    assert "inside a custom_vjp function" in report["['opaque']"].reason
    off = wrap(optalr.value_grad_and_extras(loss))
    jax.tree.map(np.testing.assert_array_equal, grads, off(params, x, y, signals=False)[1])


def test_loops_with_static_bounds_and_branches():
    def loss(params, x, y, flag, layer=no_layer):
        body = lambda i, h: jnp.tanh(layer("loop", h, h @ params["loop"]))  # noqa: E731
        if layer is no_layer:
            h = jax.lax.fori_loop(0, 3, body, x)
            h = jax.lax.cond(
                flag, lambda h: h @ params["yes"], lambda h: jnp.sin(h) @ params["no"], h
            )
            scale = jax.lax.while_loop(
                lambda c: c[0] < 1e3,
                lambda c: (c[0] * 10, c[1] @ jax.lax.stop_gradient(params["frozen"])),
                (1.0, jnp.eye(4)),
            )[1]
            h = h @ jax.lax.stop_gradient(scale)
        else:
            h = x
            for i in range(3):
                h = body(i, h)
            h = layer("yes", h, h @ params["yes"])
            h = h @ jnp.linalg.matrix_power(jax.lax.stop_gradient(params["frozen"]), 3)
        return jnp.mean(jnp.sum((h - y) ** 2, 1))

    params = {name: normal(i, 4, 4) for i, name in enumerate(["loop", "yes", "no", "frozen"])}
    x, y = normal(6, 8, 4), normal(7, 8, 4)
    expected = reference_moments(
        lambda p, x, y, layer: loss(p, x, y, True, layer), params, x, y, num_examples=8
    )
    kernels = {"loop": "loop", "yes": "yes"}
    extras = check_capture(loss, params, (x, y, jnp.array(True)), expected, kernels)
    signals = extras["signals"]
    assert signals["loop"].positions == 3
    assert not np.any(signals["no"].rows)  # the branch not taken saw nothing
    assert signals["no"].positions == 0
    assert signals["frozen"] is None
    report = optalr.coverage(loss, params, x, y, jnp.array(True))
    assert report["['frozen']"].treatment == "diagonal"
    assert report["['frozen']"].reason == "inside a while loop, which has no reverse derivative"


def test_examples_one_by_one_need_num_examples():
    """Under ``lax.map`` no axis counts the examples, so the batch size must be said."""

    def loss(params, x, y, layer=no_layer):
        one = lambda x: layer("w", x, x @ params["w"])  # noqa: E731
        out = jax.lax.map(one, x) if layer is no_layer else jnp.stack([one(row) for row in x])
        return jnp.mean(jnp.sum((out - y) ** 2, 1))

    params, x, y = {"w": normal(0, 3, 2)}, normal(1, 6, 3), normal(2, 6, 2)
    expected = reference_moments(loss, params, x, y, num_examples=6)
    extras = check_capture(loss, params, (x, y), expected, {"w": "w"}, num_examples=6)
    assert extras["signals"]["w"].count == 6
    assert extras["signals"]["w"].positions == 1


def test_what_is_no_layer_is_reported_with_its_reason():
    def loss(params, x):
        h = x @ params["masked"]
        h = h @ (params["masked"] * jnp.eye(4))
        h = h @ jax.lax.slice(params["every_other"], (0, 0), (4, 4), (1, 2))
        h = jnp.concatenate([h, params["token"][None]])
        return jnp.sum((h @ params["vector"]) ** 2) + jnp.sum(params["both"] @ params["both"].T)

    params = {
        "masked": jnp.eye(4),
        "every_other": normal(1, 4, 4),
        "token": normal(2, 2),
        "vector": normal(3, 2),
        "both": normal(4, 2, 2),
    }
    report = optalr.coverage(loss, params, normal(5, 6, 4))
    assert report["['masked']"].treatment == "kronecker"
    reasons = {leaf.path[2:-2]: leaf.reason for leaf in report.leaves}
    assert reasons == {
        "masked": "not in the moments: used by mul",
        "every_other": "sliced before its product",
        "token": "concatenated before its product",
        "vector": "a vector or scalar, not a matrix",
        "both": "multiplied by another parameter",
    }
