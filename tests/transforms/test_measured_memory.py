"""A training step's memory follows what is kept of a layer, not its whole Gram matrices.

Counted in the compiled program: its temporaries, and the arrays that it names.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.transforms.compiling import quick_jit

NARROW, WIDE, BATCH = 8, 12000, 16
OPTIONS = {
    "default": {},
    "exact": {"spectrum": "exact"},
    "measured": {"spectrum": "measured"},
    "joint": {"joint_bias": True},
    "blocks": {"block_size": 64},
    "exact blocks": {"block_size": 64, "spectrum": "exact"},
    "measured blocks": {"block_size": 64, "spectrum": "measured"},
    "joint blocks": {"block_size": 64, "joint_bias": True},
}


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"][None] - y) ** 2, 1))


def wide_problem(rows, cols):
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    return {"w": floats(rows, cols), "b": floats(cols)}, (floats(BATCH, rows), floats(BATCH, cols))


def compiled_step(tx, problem, *, traced, loss=loss_fn, **how):
    """Compile a whole step: the gradient, the signals, the update."""
    params, batch = problem
    evaluate = optalr.value_grad_and_extras(loss, **how)

    def step(params, state, *batch):
        flag = optalr.wants_signals(state) if traced else True
        _, grads, extras = evaluate(params, *batch, signals=flag)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return jax.jit(step).lower(params, jax.eval_shape(tx.init, params), *batch).compile()


def check(step, bound, size=WIDE):
    """Check the temporaries of a compiled step, and that no array is a whole Gram matrix."""
    named = set(re.findall(r"\[[\d,]*\]", step.as_text()))
    # Padded and joint sides have a few more rows.
    whole = {shape for shape in named if sum(int(n) >= size for n in re.findall(r"\d+", shape)) > 1}
    assert not whole
    assert step.memory_analysis().temp_size_in_bytes <= bound


def nbytes(tree):
    return sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


HEAD, INPUT_LAYER = (NARROW, WIDE), (WIDE, NARROW)
EVERY_CASE = [(name, *case) for name in OPTIONS for case in ((HEAD, False), (INPUT_LAYER, True))]
EVERY_CASE += [
    (name, *case) for name in ("default", "blocks") for case in ((HEAD, True), (INPUT_LAYER, False))
]


@pytest.mark.parametrize(("name", "shape", "traced"), EVERY_CASE)
def test_a_step_takes_what_is_kept(name, shape, traced):
    options = optalr.KroneckerOptions(**OPTIONS[name])
    params, batch = problem = wide_problem(*shape)
    layout = optalr.coverage(loss_fn, params, *batch, options=options)
    tx = optalr.tso_alra(1e-2, switch_at=9, layout=layout, options=options)
    kept = sum(leaf.state_bytes for leaf in layout.leaves)
    # Decomposing blocks takes four times their bytes. Operands appear with their products.
    check(compiled_step(tx, problem, traced=traced), 4 * kept + 4 * nbytes((params, batch)))


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
@pytest.mark.parametrize("last_layer", [None, "['w']"])
def test_a_lipschitz_rate_takes_the_diagonal_of_the_input(last_layer, traced):
    params, batch = problem = wide_problem(WIDE, NARROW)
    if last_layer is None:
        tx = optalr.lipschitz_sgd("binary_cross_entropy")
    else:
        tx = optalr.scale_by_lipschitz_rate("binary_cross_entropy", last_layer=last_layer)
    check(compiled_step(tx, problem, traced=traced), 2 * nbytes((params, batch)))


def twice_used(params, x, y):
    first, second = jnp.split(x, 2)
    return loss_fn(params, first, y[: len(first)]) + loss_fn(params, second, y[len(first) :])


@pytest.mark.parametrize("traced", [False, True], ids=["static", "traced"])
def test_a_layer_that_is_summed_up_takes_what_storage_says(traced):
    params, batch = problem = wide_problem(NARROW, WIDE)
    options = optalr.KroneckerOptions()
    report = optalr.coverage(twice_used, params, *batch)
    assert "cols measured whole" in report["['w']"].reason
    assert report["['w']"].measuring_bytes > 4 * WIDE**2
    report = optalr.coverage(twice_used, params, *batch, storage=options)
    assert "cols measured whole" not in report["['w']"].reason
    tx = optalr.scale_by_kronecker(layout=report, options=options)
    step = compiled_step(tx, problem, traced=traced, loss=twice_used, storage=options)
    kept = report["['w']"].state_bytes + report["['w']"].measuring_bytes
    check(step, 4 * kept + 4 * nbytes((params, batch)))


# Small enough to be compared with whole Gram matrices.


def small_problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"w": draw(11, 70) / 3, "b": draw(70) / 9}, (draw(6, 11), draw(6, 70))


@functools.partial(quick_jit, static_argnums=(0, 1))
def two_updates(tx, read, params, batch):
    state, storage = tx.init(params), read if isinstance(read, optalr.KroneckerOptions) else None
    evaluate = optalr.value_grad_and_extras(loss_fn, storage=storage)
    for _ in range(2):
        _, grads, extras = evaluate(params, *batch)
        if read == "signals":
            extras = {"signals": extras["signals"], "head": extras["head"]}
        updates, state = tx.update(grads, state, params, **extras)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -1e-2 * u, updates))
    return updates, state


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if " " in name else [])
        for name, options in OPTIONS.items()
    ],
)
def test_updates_are_those_of_whole_gram_matrices(options):
    options = {"block_size": None, **options, "max_factor_size": 20}
    options["block_size"] = options["block_size"] and 8
    options = optalr.KroneckerOptions(**options, warmup=0, min_batches=1, max_update=None)
    params, batch = small_problem()
    layout = optalr.coverage(loss_fn, params, *batch, options=options)
    tx = optalr.scale_by_kronecker(damping=0.1, layout=layout, options=options)
    expected, whole = two_updates(tx, "signals", params, batch)
    for read in ("measure", options):
        got, state = two_updates(tx, read, params, batch)
        for x, like in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            np.testing.assert_allclose(x, like, rtol=1e-4, atol=1e-5 * np.max(np.abs(like)))
        for x, like in zip(*map(jax.tree.leaves, (state.memory, whole.memory)), strict=True):
            if options.spectrum == "factored":  # eigenvectors have a sign, and orders among equals
                np.testing.assert_allclose(x, like, rtol=1e-4, atol=1e-4 * np.max(np.abs(like)))
        assert int(state.failures) == 0


@pytest.mark.parametrize("last_layer", [None, "['w']"])
def test_lipschitz_rates_are_those_of_whole_gram_matrices(last_layer):
    params, batch = small_problem()
    tx = optalr.scale_by_lipschitz_rate("binary_cross_entropy", last_layer=last_layer)
    _, expected = two_updates(tx, "signals", params, batch)
    joint = optalr.KroneckerOptions(joint_bias=True, max_factor_size=3)
    blocks = optalr.KroneckerOptions(block_size=4)
    for read in ("measure", joint, dataclasses.replace(joint, joint_bias=False), blocks):
        _, got = two_updates(tx, read, params, batch)
        np.testing.assert_allclose(got.learning_rate, expected.learning_rate, rtol=1e-5)


def test_signals_in_another_shape_than_the_states_are_refused():
    params, batch = small_problem()
    evaluate = optalr.value_grad_and_extras(
        loss_fn, storage=optalr.KroneckerOptions(max_factor_size=3)
    )
    _, grads, extras = evaluate(params, *batch)
    tx = optalr.scale_by_kronecker()
    with pytest.raises(ValueError, match=r"hold a Diagonal\(11\), but its state a Full\(11\)"):
        tx.update(grads, tx.init(params), params, **extras)


def test_blocks_of_another_matrix_view_ask_for_a_layout():
    """A stack of layers, whose state was made by its shape alone."""
    params, x = {"w": jnp.ones((3, 8, 8)) / 8}, jnp.ones((4, 16, 8))

    def stacked(params, x):
        hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
        return jnp.mean(hidden**2)

    options = optalr.KroneckerOptions(block_size=4)
    evaluate = optalr.value_grad_and_extras(stacked, storage=options)
    _, grads, extras = evaluate(params, x)
    tx = optalr.scale_by_kronecker(options=options)
    with pytest.raises(ValueError, match=r"shapes \(3, 8, 8\) and .*Pass layout="):
        tx.update(grads, tx.init(params), params, **extras)
