"""Gradients of few examples are multiplied as sums of outer products: same numbers, fewer flops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optalr
from optalr.signals.moments import is_outer_products

NUM_EXAMPLES, WIDTH = 4, 24
SPECTRA = ("factored", "exact", "measured")


def outer_products_of(loss_fn, params, *args, **options):
    """Return what stands at each leaf, after a check that it makes up the gradient."""
    evaluate = optalr.value_grad_and_extras(loss_fn, outer_products=True, **options)
    _, grads, extras = evaluate(params, *args, signals=False)
    layout = optalr.coverage(loss_fn, params, *args)
    found = extras.get("outer_products", {})
    for name, products in found.items():
        if products is None:
            continue
        left, right = (np.asarray(side, np.float64) for side in (products.left, products.right))
        gradient = np.asarray(layout[f"['{name}']"].view.to_matrix(grads[name]))
        np.testing.assert_allclose(np.swapaxes(left, -1, -2) @ right, gradient, atol=1e-5)
        assert products.gradient is grads[name]
    return {name for name, products in found.items() if is_outer_products(products)}


def square(x):
    return jnp.mean(x**2)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


KERNEL, INPUTS = normal(WIDTH, WIDTH), normal(NUM_EXAMPLES, WIDTH, seed=1)

CAUGHT = {
    "inputs in front": lambda w, x: square(x @ w),
    "kernel in front": lambda w, x: square(w @ x.T),
    "heads": lambda w, x: square(jnp.einsum("bi,ihk->bhk", x, w.reshape(WIDTH, 4, -1))),
    "a layer for each example": lambda w, x: square(jax.vmap(lambda row: jnp.tanh(row @ w))(x)),
    "scaled": lambda w, x: square(jnp.tanh(x @ (0.5 * w))),
    "inside a jit": lambda w, x: square(jax.jit(jnp.matmul)(x, w)),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_both_sides_make_up_the_gradient(name):
    def loss_fn(params, x):
        return CAUGHT[name](params["w"], x)

    assert outer_products_of(loss_fn, {"w": KERNEL}, INPUTS) == {"w"}


def test_stacked_layers_have_stacks_of_sides():
    def loss_fn(params, x):
        return square(jnp.einsum("sbi,sij->sbj", x, params["w"]))

    params = {"w": normal(3, WIDTH, WIDTH)}
    assert outer_products_of(loss_fn, params, normal(3, NUM_EXAMPLES, WIDTH)) == {"w"}


def test_joined_kernels_have_sides_of_their_own():
    def loss_fn(params, x):
        joined = jnp.concatenate([params["w"], params["v"]], axis=1)
        return square(jnp.tanh(x @ joined))

    params = {"w": KERNEL, "v": normal(WIDTH, 2 * WIDTH, seed=5)}
    assert outer_products_of(loss_fn, params, INPUTS) == {"w", "v"}


def scanned(w, x):
    return square(jax.lax.scan(lambda carry, _: (jnp.tanh(carry @ w), None), x, length=2)[0])


@jax.custom_jvp
def rounded(w):
    return jnp.round(w)


rounded.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))
MESH = jax.make_mesh((1,), ("one",), axis_types=(jax.sharding.AxisType.Auto,))


def mapped(w):
    specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec()}
    return jax.shard_map(lambda w: w, mesh=MESH, **specs)(w)


def carried(w):
    return jax.lax.scan(lambda carry, _: (w, None), jnp.zeros_like(w), None, length=2)[0]


# A copy of the kernel that comes out of these is penalized beside the layer.
COPIES = {
    "a custom_jvp function": rounded,
    "a branch": lambda w: jax.lax.cond(w.sum() > 0, lambda w: w, lambda w: 2 * w, w),
    "a loop": carried,
    "a loop that stacks": lambda w: jax.lax.scan(lambda c, _: (c, w), 0.0, None, length=2)[1],
    "a shard_map": mapped,
    "a barrier": lambda w: jax.lax.optimization_barrier((2 * w, w))[1],
    "an inner jit": jax.jit(lambda w: w.T),
    "a remat": jax.checkpoint(lambda w: w),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_penalized_is_seen(name):
    def loss_fn(params, x):
        return square(x @ params["w"]) + square(COPIES[name](params["w"]))

    assert not outer_products_of(loss_fn, {"w": KERNEL}, INPUTS)
    assert optalr.coverage(loss_fn, {"w": KERNEL}, INPUTS)["['w']"].reason


LEFT = {
    "a penalty": lambda w, x: square(x @ w) + square(w),
    "a penalty through its transpose": lambda w, x: square(x @ w) + jnp.sum(w.T**2),
    "used twice": lambda w, x: square(jnp.tanh(x @ w) @ w),
    "part of it": lambda w, x: square(x[:, : WIDTH // 2] @ w[: WIDTH // 2]),
    "in a loop": scanned,
    "in a remat": lambda w, x: square(jax.checkpoint(jnp.matmul)(x, w)),
    "in half precision": lambda w, x: square(
        (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
    ),
    "many examples": lambda w, x: square(jnp.tile(x, (8, 1)) @ w),
    "normalized": lambda w, x: square(x @ (w / jnp.linalg.norm(w))),
    "no gradient": lambda w, x: square(x @ jax.lax.stop_gradient(w)),
    "also added": lambda w, x: square(x @ w + w[:1]),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_gradients_are_left_alone(name):
    def loss_fn(params, x):
        return LEFT[name](params["w"], x)

    assert not outer_products_of(loss_fn, {"w": KERNEL}, INPUTS)


def test_drawn_targets_make_up_no_gradient():
    loss_fn = optalr.composite_loss(lambda params, x: x @ params["w"], lambda out, x: square(out))
    options = {"fisher": "true", "likelihood": "gaussian", "outer_products": True}
    evaluate = optalr.value_grad_and_extras(loss_fn, **options)
    _, _, extras = evaluate({"w": KERNEL}, INPUTS, key=jax.random.key(0))
    assert "outer_products" not in extras


def predict(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None]) @ params["w2"]
    return jnp.einsum("bi,ihk->bhk", jnp.tanh(hidden), params["heads"])


def loss_fn(params, x):
    return square(predict(params, x) - 1)


def make_params():
    params = {"w1": normal(WIDTH, 30), "w2": normal(30, 24, seed=2), "heads": normal(24, 6, 4)}
    return {**jax.tree.map(lambda kernel: kernel / 5, params), "b1": jnp.zeros(30)}


def run(tx, steps=14, spoiled=(), **options):
    step, params = optalr.train_step(loss_fn, tx, donate=False, **options), make_params()
    state = tx.init(params)
    for seed in range(steps):
        x = normal(NUM_EXAMPLES, WIDTH, seed=seed) * (jnp.nan if seed in spoiled else 1)
        params, state, _ = step(params, state, x)
    return params, state


def both_ways(tx, **options):
    """Return a run's parameters and state, with outer products and without."""
    return run(tx, **options), run(tx, outer_products=False, **options)


LAYOUT = optalr.coverage(loss_fn, make_params(), INPUTS)


def kronecker(layout=LAYOUT, statistics="signals", **options):
    given = {"layout": layout, "statistics": statistics}
    scale = optalr.scale_by_kronecker(update_every=4, options=options, **given)
    return optax.chain(scale, optax.scale(-0.03))


def assert_same(one, two):
    for mine, other in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-3, atol=1e-5)


METHODS = {
    **{spectrum: functools.partial(kronecker, spectrum=spectrum) for spectrum in SPECTRA},
    "blocks": functools.partial(kronecker, block_size=9),
    "a diagonal": functools.partial(kronecker, max_factor_size=26, block_size=None),
    "joint biases": functools.partial(kronecker, joint_bias=True),
    "the gradient's statistics": functools.partial(kronecker, statistics="gradient"),
    "another view": functools.partial(kronecker, None, statistics="gradient"),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), kronecker()),
    "masked": lambda: optax.masked(
        kronecker(), {"w1": True, "b1": True, "w2": False, "heads": True}
    ),
    "gathered": lambda: optalr.multi_steps(kronecker(), 2),
    "guarded": lambda: optalr.guard(kronecker()),
    "tso_alra": lambda: optalr.tso_alra(
        0.03, switch_at=10, second_learning_rate=0.01, layout=LAYOUT
    ),
    "untuned": lambda: optalr.untuned(14, layout=LAYOUT),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_the_numbers_of_one_on_gradients(name):
    (params, state), (other, other_state) = both_ways(METHODS[name]())
    assert_same(params, other)
    assert jax.tree.structure(state) == jax.tree.structure(other_state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factored", "tso_alra"])
def test_a_broken_batch_counts_as_often(name):
    (params, state), (other, other_state) = both_ways(METHODS[name](), spoiled=(6, 9))
    assert_same(params, other)
    mine, others = (optalr.metrics(each)["failures"] for each in (state, other_state))
    np.testing.assert_array_equal(mine, others)
    assert np.sum(mine) >= 2


PRODUCT = re.compile(
    r"stablehlo\.dot_general .*?contracting_dims = \[([\d, ]*)\] x .*?"
    r": \(tensor<([\dx]+)xf32>, tensor<([\dx]+)xf32>\) -> tensor<([\dx]+)xf32>"
)


def flops_of_products(program):
    total = 0
    for contracted, left, _, result in PRODUCT.findall(program):
        sizes = [int(size) for size in left.split("x")]
        inside = np.prod([sizes[int(axis)] for axis in contracted.split(",")])
        total += 2 * inside * np.prod([int(size) for size in result.split("x")])
    return total


def lowered(tx, kind, params, x, **options):
    step = optalr.train_step(loss_fn, tx, **options)
    return step.lower(params, jax.eval_shape(tx.init, params), x, kind=kind).as_text()


def test_a_plain_step_multiplies_no_gradient():
    plain = functools.partial(lowered, kronecker(), "plain", make_params(), INPUTS)
    shapes, r = [(24, 30), (30, 24), (24, 24)], NUM_EXAMPLES
    # Of each kernel a product, its gradient, and that of its inputs, but for the first one's.
    gradient = sum(6 * r * m * n for m, n in shapes) - 2 * r * 24 * 30
    sides = sum(2 * r * (m * m + n * n + m * n) for m, n in shapes)
    bias = 2 * 30 * 30
    assert flops_of_products(plain()) == gradient + sides + bias
    whole = sum(2 * m * n * (m + n) for m, n in shapes)
    assert flops_of_products(plain(outer_products=False)) == gradient + whole + bias


def test_a_second_stage_multiplies_no_sides():
    tx = METHODS["tso_alra"]()
    second = functools.partial(lowered, tx, "second", make_params(), INPUTS)
    assert flops_of_products(second()) == flops_of_products(second(outer_products=False))


def test_over_a_mesh_gradients_are_multiplied():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=sharded)
    plain = functools.partial(lowered, kronecker(), "plain", make_params(), x)
    assert flops_of_products(plain()) == flops_of_products(plain(outer_products=False))
