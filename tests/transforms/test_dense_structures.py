"""The exact structures: one block a leaf, the full matrix, and its window."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.transforms.dense.block_diagonal import scale_by_block_diagonal
from optalr.transforms.dense.full_matrix import scale_by_full_matrix
from tests.transforms.branches import assert_roots_stay_in_branches

ALL = pytest.mark.parametrize(
    "tx",
    [scale_by_block_diagonal(), scale_by_full_matrix(), scale_by_full_matrix(window=2)],
    ids=["block", "full", "window"],
)
BOTH = pytest.mark.parametrize("method", [scale_by_block_diagonal, scale_by_full_matrix])


def power_of(matrix, power):
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * values**power) @ vectors.T


@functools.cache
def jitted(update):
    return jax.jit(update)


def trajectory(tx, grads):
    """Return the updates for a sequence of gradients, and the last state."""
    state, updates = tx.init(grads[0]), []
    for g in grads:
        update, state = jitted(tx.update)(g, state)
        updates.append(update)
    return updates, state


def sequence(shape, length, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(length)]


@BOTH
def test_one_update_by_hand(method):
    g = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    updates, _ = trajectory(method(decay=0.5, damping=1.0, damping_form="absolute"), [g])
    # F = ggᵀ: one eigenvalue 25 along g, so u = g/√26.
    np.testing.assert_allclose(updates[0], g / np.sqrt(26), rtol=1e-5)


@BOTH
@pytest.mark.parametrize("power", [-0.5, -0.3, -1.0, 0.0])
@pytest.mark.parametrize("decay", [0.8, None])
def test_the_dense_reference(method, power, decay):
    grads = sequence((2, 3), 4)
    updates, _ = trajectory(method(power, decay=decay, damping=1e-2), grads)
    moment, weight = np.zeros((6, 6)), 0.0
    for g in grads:
        v = np.asarray(g, np.float64).reshape(-1)
        if decay is None:
            moment, weight = moment + np.outer(v, v), 1.0
        else:
            moment = decay * moment + (1 - decay) * np.outer(v, v)
            weight = decay * weight + 1 - decay
    f = moment / weight
    f = f + 1e-2 * np.trace(f) / 6 * np.eye(6)
    np.testing.assert_allclose(updates[-1].reshape(-1), power_of(f, power) @ v, rtol=1e-3)


@BOTH
def test_one_parameter_is_adagrad_and_rmsprop(method):
    grads = sequence((1,), 6)
    ours, _ = trajectory(method(decay=None, damping=1e-8, damping_form="absolute"), grads)
    adagrad = optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-8)
    np.testing.assert_allclose(ours, trajectory(adagrad, grads)[0], rtol=1e-4)
    tx = method(decay=0.9, damping=1e-8, damping_form="absolute", bias_correction=False)
    rms = optax.scale_by_rms(decay=0.9, eps=1e-8, eps_in_sqrt=True, bias_correction=False)
    np.testing.assert_allclose(trajectory(tx, grads)[0], trajectory(rms, grads)[0], rtol=1e-4)


@BOTH
def test_gradients_along_the_axes_make_it_diagonal(method):
    # Each gradient moves one parameter only, so F is diagonal.
    eye = np.eye(4)
    scales = np.random.default_rng(3).standard_normal(8)
    grads = [jnp.asarray(s * eye[i % 4], jnp.float32) for i, s in enumerate(scales)]
    tx = method(decay=0.9, damping=1e-6, damping_form="absolute", bias_correction=False)
    rms = optax.scale_by_rms(decay=0.9, eps=1e-6, eps_in_sqrt=True, bias_correction=False)
    for ours, theirs in zip(trajectory(tx, grads)[0], trajectory(rms, grads)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_block_knows_nothing_of_other_leaves():
    a, b = sequence((2, 2), 3), sequence((3,), 3, seed=1)
    pairs = [{"a": x, "b": y} for x, y in zip(a, b, strict=True)]
    together, _ = trajectory(scale_by_block_diagonal(), pairs)
    alone, _ = trajectory(scale_by_block_diagonal(), a)
    np.testing.assert_allclose(together[-1]["a"], alone[-1], rtol=1e-4, atol=1e-6)


def test_the_full_matrix_sees_across_leaves():
    grads = sequence((4,), 3)
    split = [{"a": g[:1], "b": g[1:]} for g in grads]
    whole, _ = trajectory(scale_by_full_matrix(), grads)
    parts, _ = trajectory(scale_by_full_matrix(), split)
    joined = jnp.concatenate([parts[-1]["a"], parts[-1]["b"]])
    np.testing.assert_allclose(joined, whole[-1], rtol=1e-5)


@pytest.mark.parametrize("power", [-0.5, -1.0, 0.0])
@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("length", [2, 4, 7])
def test_a_window_is_the_matrix_of_the_last_gradients(power, decay, length):
    grads = sequence((3, 3), length)
    tx = scale_by_full_matrix(power, decay=decay, damping=1e-2, damping_form="absolute", window=4)
    updates, _ = trajectory(tx, grads)
    last = [np.asarray(g, np.float64).reshape(-1) for g in grads[-4:]]
    weights = np.ones(len(last))
    if decay is not None:
        weights = decay ** np.arange(len(last))[::-1]
        weights = weights / weights.sum()
    f = sum(w * np.outer(v, v) for w, v in zip(weights, last, strict=True)) + 1e-2 * np.eye(9)
    np.testing.assert_allclose(
        updates[-1].reshape(-1), power_of(f, power) @ last[-1], rtol=2e-3, atol=1e-4
    )


def test_a_window_longer_than_the_run_is_the_whole_matrix():
    grads = sequence((5,), 6)
    arguments = {"damping": 1e-3, "damping_form": "absolute", "decay": None}
    windowed, _ = trajectory(scale_by_full_matrix(window=10, **arguments), grads)
    whole, _ = trajectory(scale_by_full_matrix(**arguments), grads)
    np.testing.assert_allclose(windowed[-1], whole[-1], rtol=1e-3, atol=1e-4)


def test_a_window_takes_a_vector_that_no_matrix_could():
    tx = scale_by_full_matrix(window=2)
    shapes = jax.eval_shape(tx.init, jnp.zeros(10**6))
    assert optalr.state_bytes(shapes) < 2.1 * 4 * 10**6
    g = jnp.ones(10**5)
    updates, _ = tx.update(g, tx.init(g))
    assert bool(jnp.isfinite(updates).all())


@pytest.mark.parametrize("window", [None, 3])
def test_without_damping_repeated_gradients_do_no_harm(window):
    g = sequence((4,), 1)[0]
    tx = scale_by_full_matrix(decay=None, damping=0.0, window=window)
    updates, state = trajectory(tx, [g, g, g])
    np.testing.assert_allclose(updates[-1], g / jnp.linalg.norm(g) / np.sqrt(3), rtol=1e-2)
    assert int(state.failures) == 0


@ALL
def test_zero_and_not_finite_gradients(tx):
    good, zero = jnp.array([1.0, 2.0]), jnp.zeros(2)
    updates, state = trajectory(tx, [zero, good, good.at[0].set(jnp.nan), good])
    assert float(jnp.abs(updates[0]).max()) == 0
    assert float(jnp.abs(updates[2]).max()) == 0
    assert int(state.failures) == 1
    assert bool(jnp.isfinite(updates[3]).all())
    assert float(jnp.abs(updates[3]).max()) > 0


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("window", ["block", None, 2])
def test_a_gradient_whose_square_overflows_leaves_no_trace(window, decay):
    method = scale_by_block_diagonal if window == "block" else scale_by_full_matrix
    arguments = {} if window == "block" else {"window": window}
    tx = method(decay=decay, **arguments)
    good, large = sequence((3,), 2), jnp.array([1e20, 1.0, 1.0])
    updates, state = trajectory(tx, [good[0], large, large, good[1]])
    expected, without = trajectory(tx, good)
    assert float(jnp.abs(updates[1]).max()) == 0
    np.testing.assert_allclose(updates[3], expected[1], rtol=1e-4)
    assert int(state.failures) == 2
    for x, y in zip(jax.tree.leaves(state)[5:], jax.tree.leaves(without)[5:], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


@ALL
def test_sums_do_not_overflow_either(tx):
    # Each square is finite, the trace of them together is not.
    updates, state = trajectory(tx, [jnp.ones(3), jnp.full(3, 1.5e19), jnp.ones(3)])
    assert float(jnp.abs(updates[1]).max()) == 0
    assert float(jnp.abs(updates[2]).max()) > 0.1
    assert int(state.failures) == 1


@ALL
@pytest.mark.parametrize("scale", [1e-9, 1e9, 1e16])
def test_the_scale_of_gradients_does_not_matter(tx, scale):
    grads = sequence((3,), 3)
    expected, _ = trajectory(tx, grads)
    updates, state = trajectory(tx, [scale * g for g in grads])
    np.testing.assert_allclose(updates[-1], expected[-1], rtol=2e-3, atol=1e-3)
    assert int(state.failures) == 0


@ALL
@pytest.mark.parametrize(
    "params", [{}, {"none": jnp.zeros(0)}, {"none": jnp.zeros((0, 3)), "w": jnp.ones(2)}]
)
def test_leaves_without_numbers_and_trees_without_leaves(tx, params):
    updates, state = trajectory(tx, [params, params])
    assert jax.tree.map(jnp.shape, updates[1]) == jax.tree.map(jnp.shape, params)
    assert int(state.failures) == 0
    masked = optax.masked(tx, jax.tree.map(lambda _: False, params))
    updates, _ = trajectory(masked, [params])
    assert jax.tree.map(jnp.shape, updates[0]) == jax.tree.map(jnp.shape, params)


def test_a_root_that_is_kept_back_keeps_its_residual():
    tx = scale_by_block_diagonal(damping_form="absolute")
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = trajectory(tx, [params])
    assert 0 < float(state.root_residual) < 1e-2
    # Not semidefinite: the root of one leaf of two fails.
    broken = state._replace(
        moments={**state.moments, "a": -100 * jnp.eye(2)}, root_residual=jnp.float32(0.5)
    )
    _, after = jitted(tx.update)(params, broken)
    assert int(after.failures) == 1
    np.testing.assert_array_equal(after.roots["a"], state.roots["a"])
    assert float(after.root_residual) == 0.5
    assert int(after.root_age) == 0  # not every step may pay for another try
    _, after = jitted(tx.update)(params, after._replace(moments=state.moments))
    assert float(after.root_residual) < 1e-2


@BOTH
@pytest.mark.parametrize("lanes", [None, 3])
def test_roots_are_taken_in_a_branch_only(method, lanes):
    """In a loop of no turn or one, that is, which stays one when several states are vmapped."""
    tx = method()
    args = jnp.ones((2, 3)), tx.init(jnp.ones((2, 3)))
    assert_roots_stay_in_branches(tx.update, args, lanes)


@ALL
def test_products_are_taken_in_full_precision(tx):
    g = jnp.ones(3)
    printed = str(jax.make_jaxpr(tx.update)(g, tx.init(g)))
    products = re.findall(r"dot_general\[(.*?)\n\s*\]", printed, re.DOTALL)
    assert products
    assert all("Precision.HIGHEST" in product for product in products)


def test_a_window_of_doubles_is_worked_on_in_doubles():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((3, 6))
    with jax.enable_x64(True):
        tx = scale_by_full_matrix(decay=None, damping=1e-8, damping_form="absolute", window=4)
        updates, state = trajectory(tx, list(jnp.asarray(rows)))
        assert state.gram.dtype == jnp.float64
        mixed = tx.init({"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)})
        assert mixed.gram.dtype == jnp.float64
    expected = power_of(rows.T @ rows + 1e-8 * np.eye(6), -0.5) @ rows[-1]
    # The part outside the window is amplified 1e4 times; floats err by 6e-3 here.
    np.testing.assert_allclose(updates[-1], expected, rtol=1e-8, atol=1e-9)


def test_what_would_not_fit_is_refused_with_its_bytes_and_the_way_out():
    params = {"small": jnp.zeros(3), "w": jnp.zeros((100, 30))}
    message = r"\['w'\] with 3,000 numbers would take 72,000,000 bytes.*scale_by_kronecker"
    with pytest.raises(ValueError, match=message):
        scale_by_block_diagonal().init(params)
    message = r"3,003 parameters would take 72,144,072 bytes.*scale_by_kronecker.*window="
    with pytest.raises(ValueError, match=message):
        scale_by_full_matrix(max_size=1000).init(params)
    scale_by_full_matrix(max_size=1000, window=2).init(params)


def test_a_window_that_would_not_fit_is_refused_with_its_bytes_and_the_way_out():
    def init(tx, size):
        return jax.eval_shape(tx.init, jax.ShapeDtypeStruct((size,), jnp.float32))

    message = r"window=10,000 .* 100,000,000 parameters would take 4,000,400,000,000 bytes"
    message += r".*max_size=16,384 accepts 2,147,483,648.*window=.*scale_by_kronecker.*max_size"
    with pytest.raises(ValueError, match=message):
        init(scale_by_full_matrix(window=10_000), 10**8)
    init(scale_by_full_matrix(window=200), 2 * 10**6)
    # r P + r² numbers, as many as the whole matrix of max_size parameters and its root.
    init(scale_by_full_matrix(window=10, max_size=10), 10)
    with pytest.raises(ValueError, match="max_size=10 "):
        init(scale_by_full_matrix(window=10, max_size=10), 11)
    init(scale_by_full_matrix(window=10_000, max_size=10**6), 10**8)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"power": 1.0}, "power"),
        ({"decay": 1.5}, "decay"),
        ({"damping": -1.0}, "damping"),
        ({"damping_form": "both"}, "damping_form"),
        ({"update_every": 0}, "update_every"),
        ({"max_size": 0}, "max_size"),
    ],
)
def test_bad_arguments_are_named(method, arguments, name):
    with pytest.raises(ValueError, match=name):
        method(**arguments)


def test_a_bad_window_is_named():
    with pytest.raises(ValueError, match="window"):
        scale_by_full_matrix(window=0)
