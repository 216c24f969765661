"""The Kronecker form against dense matrices; what its state holds, and when it measures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.transforms.kronecker.transform import (
    KroneckerOptions,
    KroneckerState,
    scale_by_kronecker,
)
from tests.transforms.kronecker_layers import (
    BARE,
    N,
    gram,
    moments,
    power_of,
    relative,
    run,
)


def test_one_update_by_hand():
    grads = {"w": jnp.array([[8.0, 2.0], [3.0, 6.0]])}
    signals = {"w": moments(np.diag([4.0, 1.0]), np.diag([16.0, 4.0]))}
    updates, _ = run(scale_by_kronecker(damping=0.0, options=BARE), grads, signals)
    # A^{-1/2} = diag(1/2, 1), B^{-1/2} = diag(1/4, 1/2)
    np.testing.assert_allclose(updates["w"], [[1.0, 0.5], [0.75, 3.0]], rtol=1e-5)


@pytest.mark.parametrize("power", [-0.25, -0.5, -0.7, -1.0])
def test_kernel_and_bias_equal_the_dense_matrix(layer, power):
    grads, signals, rows, cols = layer
    tx = scale_by_kronecker(power, damping=1e-2, options=BARE)
    updates, _ = run(tx, grads, signals)
    a, b = relative(rows, 1e-2), relative(cols, 1e-2)
    dense = power_of(np.kron(b, a), power)
    vec = np.asarray(grads["kernel"], np.float64).T.reshape(-1)  # column-stacking
    np.testing.assert_allclose(updates["kernel"].T.reshape(-1), dense @ vec, rtol=2e-4, atol=1e-4)
    expected = power_of(b, power) @ np.asarray(grads["bias"], np.float64)
    np.testing.assert_allclose(updates["bias"], expected, rtol=2e-4)


def test_power_zero_is_the_gradient(layer):
    grads, signals, *_ = layer
    updates, _ = run(scale_by_kronecker(0.0, options=BARE), grads, signals)
    for name in grads:
        np.testing.assert_array_equal(updates[name], grads[name])


def test_moving_averages_are_corrected_for_their_start(layer, rng):
    grads, signals, rows, cols = layer
    tx = scale_by_kronecker(decay=0.9, damping=1e-2, options=BARE)
    _, state = run(tx, grads, signals)
    other = gram(rng, 5)
    second = {**signals, "kernel": moments(other, cols, bias="['bias']")}
    updates, state = run(tx, grads, second, state)
    mean = (0.9 * 0.1 * rows + 0.1 * other) / (1 - 0.9**2)
    a, b = relative(mean, 1e-2), relative(cols, 1e-2)
    expected = power_of(a, -0.5) @ np.asarray(grads["kernel"]) @ power_of(b, -0.5)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4)
    assert int(state.measurements) == 2
    assert int(state.num_refreshes) == 2


def test_leaves_without_a_layer_live_on_the_scale_of_one_example(rng):
    grads = {
        "kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "scale": jnp.asarray(rng.standard_normal(4), jnp.float32),
        "table": jnp.asarray(rng.standard_normal((6, 2)), jnp.float32),
    }
    signals = {"kernel": moments(gram(rng, 4), gram(rng, 3)), "scale": None, "table": None}
    updates, _ = run(scale_by_kronecker(damping=1e-2, options=BARE), grads, signals)

    moment = N * np.square(grads["scale"])
    expected = grads["scale"] / np.sqrt(moment + 1e-2 * moment.mean())
    np.testing.assert_allclose(updates["scale"], expected, rtol=1e-5)

    g = np.asarray(grads["table"], np.float64)
    a, b = g @ g.T / np.sum(g**2), N * g.T @ g
    np.testing.assert_allclose(np.trace(np.kron(b, a)), N * np.sum(g**2))
    a, b = relative(a, 1e-2), relative(b, 1e-2)
    np.testing.assert_allclose(
        updates["table"], power_of(a, -0.5) @ g @ power_of(b, -0.5), rtol=1e-3, atol=1e-5
    )


def test_gradient_statistics_are_shampoos(rng):
    g = rng.standard_normal((4, 3))
    tx = scale_by_kronecker(damping=1e-3, statistics="gradient", options=BARE)
    updates, state = run(tx, {"w": jnp.asarray(g, jnp.float32)}, None)
    left, right = relative(g @ g.T, 1e-3), relative(g.T @ g, 1e-3)
    expected = power_of(left, -0.25) @ g @ power_of(right, -0.25)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-3, atol=1e-4)
    assert not bool(state.wants_signals)
    # Scale-free up to damping, which is relative: with p on each factor it would go as 1/|g|.
    again, _ = run(tx, {"w": jnp.asarray(1e3 * g, jnp.float32)}, None)
    np.testing.assert_allclose(again["w"], updates["w"], rtol=1e-3, atol=1e-4)


def test_state_holds_two_factors_and_two_roots_and_no_third_copy(layer):
    grads, *_ = layer
    m, n = grads["kernel"].shape
    shapes = jax.eval_shape(scale_by_kronecker().init, grads)
    scalars = sum(1 for leaf in jax.tree.leaves(shapes) if leaf.shape == ())
    total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert total - scalars == 2 * (m**2 + n**2) + n  # and n for the bias, should it stand alone
    assert optalr.state_bytes(shapes) < 4 * total + 1


def test_shapes_and_types_never_change(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker()
    state = tx.init(grads)
    _, after = run(tx, grads, signals, state)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (before.shape, before.dtype, before.weak_type) == (now.shape, now.dtype, False)


def test_gradients_pass_until_every_factor_has_seen_enough(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=KroneckerOptions(min_batches=4, max_update=None))
    state = tx.init(grads)
    for step in range(5):
        updates, state = run(tx, grads, signals, state)
        passed = bool(jnp.all(updates["kernel"] == grads["kernel"]))
        assert passed == (step < 3)
        assert (int(state.num_refreshes) == 0) == (step < 3)


def test_a_factor_larger_than_its_samples_waits_longer(rng):
    grads = {"w": jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)}
    signals = {"w": moments(gram(rng, 5), gram(rng, 3), count=1)}
    tx = scale_by_kronecker(options=KroneckerOptions(min_batches=2))
    state = tx.init(grads)
    steps = 0
    while int(state.num_refreshes) == 0:
        _, state = run(tx, grads, signals, state)
        steps += 1
    assert steps == 10  # two samples for each of five rows, one example a batch


def test_wants_signals_tells_which_update_measures(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(update_every=20, signals_every=5, options=BARE)
    off = jax.tree.map(jnp.zeros_like, signals)
    state, wanted, refreshed = tx.init(grads), [], []
    for step in range(100):
        wants = bool(state.wants_signals)
        if wants:
            wanted.append(step)
        before = int(state.num_refreshes)
        _, state = run(tx, grads, signals if wants else off, state)
        if int(state.num_refreshes) > before:
            refreshed.append(step)
    assert int(state.measurements) == len(wanted)
    assert list(np.diff(wanted)[-8:]) == [5] * 8
    gaps = np.diff(refreshed)
    assert all(gaps[1:] >= gaps[:-1])
    assert gaps[-1] == 20
    assert gaps[0] == 1


def test_no_signals_in_a_batch_leave_the_factors_alone(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=BARE)
    _, state = run(tx, grads, signals)
    _, after = run(tx, grads, jax.tree.map(jnp.zeros_like, signals), state)
    np.testing.assert_array_equal(
        after.memory.rows.factor["kernel"], state.memory.rows.factor["kernel"]
    )
    assert int(after.measurements) == 1
    assert float(after.weight) == float(state.weight)
    assert bool(after.wants_signals)


def test_other_layers_do_not_matter(layer, rng):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=dataclasses.replace(BARE, max_update=0.5))
    alone, _ = run(tx, {"a": grads}, {"a": _with_bias(signals, "['a']['bias']")})
    more = {"w": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    both, _ = run(
        tx,
        {"a": grads, "0": more},
        {
            "a": _with_bias(signals, "['a']['bias']"),
            "0": {"w": moments(gram(rng, 5), gram(rng, 7))},
        },
    )
    np.testing.assert_allclose(both["a"]["kernel"], alone["a"]["kernel"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both["a"]["bias"], alone["a"]["bias"], rtol=1e-5, atol=1e-6)


def _with_bias(signals, path):
    return {**signals, "kernel": dataclasses.replace(signals["kernel"], bias=path)}


def test_numbers_may_be_injected_and_traced(layer):
    grads, signals, *_ = layer
    make = functools.partial(scale_by_kronecker, options=BARE)
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(
        power=lambda count: -0.5, decay=0.9, damping=1e-2, update_every=20, signals_every=2
    )
    plain = make(-0.5, decay=0.9, damping=1e-2, update_every=20, signals_every=2)
    expected, _ = run(plain, grads, signals)
    updates, state = run(injected, grads, signals)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(float(state.inner_state.damping), 1e-2, rtol=1e-6)


def test_bfloat16_parameters_keep_float32_factors(layer):
    grads, signals, *_ = layer
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    updates, state = run(scale_by_kronecker(options=BARE), half, signals)
    assert updates["kernel"].dtype == jnp.bfloat16
    assert state.memory.rows.factor["kernel"].dtype == jnp.float32
    assert state.damping.dtype == jnp.float32


def test_a_long_side_keeps_the_diagonal_of_its_factor(rng):
    g = jnp.asarray(rng.standard_normal((9, 3)), jnp.float32)
    rows, cols = gram(rng, 9), gram(rng, 3)
    tx = scale_by_kronecker(damping=1e-2, options=dataclasses.replace(BARE, max_factor_size=8))
    updates, state = run(tx, {"w": g}, {"w": moments(rows, cols)})
    assert state.memory.rows.factor["w"].shape == (9,)
    a, b = relative(np.diag(np.diag(rows)), 1e-2), relative(cols, 1e-2)
    np.testing.assert_allclose(
        updates["w"], power_of(a, -0.5) @ np.asarray(g) @ power_of(b, -0.5), rtol=1e-4, atol=1e-5
    )


def test_masked_leaves_do_not_disturb(layer):
    grads, signals, *_ = layer
    tx = optax.masked(scale_by_kronecker(options=BARE), {"kernel": True, "bias": False})
    updates, _ = run(tx, grads, signals)
    expected, _ = run(scale_by_kronecker(options=BARE), grads, signals)
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], grads["bias"])


def test_state_trees_map_like_parameters(layer):
    grads, *_ = layer
    tx = scale_by_kronecker()
    doubled = optax.tree.map_params(tx, lambda x: x + 1, tx.init(grads))
    assert isinstance(doubled, KroneckerState)
    assert float(doubled.memory.rows.factor["kernel"][0, 0]) == 1
    assert int(doubled.count) == 0


def test_averages_are_taken_in_the_precision_of_the_factors():
    with jax.enable_x64(True):
        grads = [jnp.asarray(g) for g in np.random.default_rng(0).standard_normal((2, 4, 3))]
        tx = scale_by_kronecker(decay=0.95, statistics="gradient", signals_every=1, update_every=1)
        state = tx.init(grads[0])
        for gradient in grads:
            _, state = tx.update(gradient, state, gradient)
        first, second = grads
        wanted = 0.05 * (0.95 * first @ first.T + second @ second.T)
        np.testing.assert_allclose(state.memory.rows.factor, wanted, rtol=1e-12)
