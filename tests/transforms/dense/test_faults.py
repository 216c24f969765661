"""Gradients and trees that are hard: zero, not finite, huge, tiny, empty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr import scale_by_block_diagonal, scale_by_full_matrix
from tests.transforms.dense.problems import ALL, jitted, sequence, trajectory


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


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25])
@pytest.mark.parametrize("make", [scale_by_full_matrix, scale_by_block_diagonal])
def test_a_root_out_of_date_makes_no_update_longer_than_a_fresh_one_could(make, power):
    """After zeros the roots are those of a moment that has nearly faded away."""
    after = [*sequence((6,), 6, seed=3)]
    zeros = [jnp.zeros(6)] * 80
    stale, state = trajectory(make(power, update_every=2), [*after, *zeros, *after])
    q, moment, weight = -power, np.zeros((6, 6)), 0.0
    for u, g in zip(stale, [*after, *zeros, *after], strict=True):
        vector = np.asarray(g, np.float64)
        moment = 0.95 * moment + 0.05 * np.outer(vector, vector)
        weight = 0.95 * weight + 0.05
        # A fresh root holds g itself, with the weight of the newest gradient, and the damping.
        share, added = 0.05 / weight, 1e-3 * np.trace(moment) / weight / 6
        if q <= 0.5:
            limit = np.linalg.norm(vector) ** (1 - 2 * q) * share**-q
        else:
            limit = added ** (0.5 - q) * share**-0.5
        assert np.linalg.norm(u) <= 1.06 * limit
    assert int(state.bounded_steps) > 0
    assert int(optalr.metrics(state)["bounded_steps"]) == int(state.bounded_steps)
    assert int(state.failures) == 0


@pytest.mark.parametrize(
    ("factory", "given", "name"),
    [
        (scale_by_block_diagonal, {}, "max_size"),
        (scale_by_full_matrix, {"window": 3}, "window"),
        (scale_by_full_matrix, {"max_size": 100}, "max_size"),
    ],
)
def test_a_traced_number_that_decides_shapes_is_refused_by_name(factory, given, name):
    tx, params = optax.inject_hyperparams(factory)(**given), jnp.ones(3)
    state = tx.init(params)
    with pytest.raises(TypeError, match=rf"{name} .*static_args=\('{name}',\)"):
        jax.jit(tx.update)(params, state, params)
    static = optax.inject_hyperparams(factory, static_args=(name,))(**given)
    updates, _ = jax.jit(static.update)(params, static.init(params), params)
    assert bool(jnp.isfinite(updates).all())
