"""The exact structures: one block a leaf, the full matrix, and its window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.transforms.block_diagonal import scale_by_block_diagonal
from optalr.transforms.full_matrix import scale_by_full_matrix

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


@pytest.mark.parametrize(
    "tx",
    [scale_by_block_diagonal(), scale_by_full_matrix(), scale_by_full_matrix(window=2)],
    ids=["block", "full", "window"],
)
def test_zero_and_not_finite_gradients(tx):
    good, zero = jnp.array([1.0, 2.0]), jnp.zeros(2)
    updates, state = trajectory(tx, [zero, good, good.at[0].set(jnp.nan), good])
    assert float(jnp.abs(updates[0]).max()) == 0
    assert float(jnp.abs(updates[2]).max()) == 0
    assert int(state.failures) == 1
    assert bool(jnp.isfinite(updates[3]).all())
    assert float(jnp.abs(updates[3]).max()) > 0


def test_what_would_not_fit_is_refused_with_its_bytes_and_the_way_out():
    params = {"small": jnp.zeros(3), "w": jnp.zeros((100, 30))}
    message = r"\['w'\] with 3,000 numbers would take 72,000,000 bytes.*scale_by_kronecker"
    with pytest.raises(ValueError, match=message):
        scale_by_block_diagonal().init(params)
    message = r"3,003 parameters would take 72,144,072 bytes.*scale_by_kronecker.*window="
    with pytest.raises(ValueError, match=message):
        scale_by_full_matrix(max_size=1000).init(params)
    scale_by_full_matrix(max_size=1000, window=2).init(params)


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
