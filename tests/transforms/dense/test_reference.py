"""Both structures against dense float64 references, and against optax where they are diagonal."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optalr import scale_by_block_diagonal, scale_by_full_matrix
from tests.transforms.dense.problems import BOTH, power_of, sequence, trajectory


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
