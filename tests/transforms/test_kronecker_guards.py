"""The Kronecker form in trouble: numbers that are not finite, failed roots, huge updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optalr.signals.moments import LeafView
from optalr.transforms.kronecker.transform import scale_by_kronecker
from tests.transforms.kronecker_layers import (
    BARE,
    gram,
    layout_of,
    moments,
    run,
)


def poisoned(state):
    """The state with a factor of the kernel's rows that is not finite."""
    rows = state.memory.rows
    rows = rows._replace(factor={**rows.factor, "kernel": jnp.full((5, 5), jnp.nan)})
    return state._replace(memory=state.memory._replace(rows=rows))


def assert_same_factors(state, other):
    for side, before in zip(state.memory.sides, other.memory.sides, strict=True):
        np.testing.assert_array_equal(side.factor["kernel"], before.factor["kernel"])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nothing_that_is_not_finite_reaches_factors_or_updates(layer, bad):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=BARE)
    good, state = run(tx, grads, signals)
    broken = {**grads, "kernel": grads["kernel"].at[1, 1].set(bad)}
    kernel = dataclasses.replace(signals["kernel"], rows=signals["kernel"].rows.at[0, 0].set(bad))
    updates, after = run(tx, broken, {**signals, "kernel": kernel}, state)
    assert all(float(jnp.abs(u).max()) == 0 for u in jax.tree.leaves(updates))
    assert int(after.failures) == 1
    assert_same_factors(after, state)
    again, _ = run(tx, grads, signals, after)
    scale = float(jnp.abs(good["kernel"]).max())
    np.testing.assert_allclose(again["kernel"], good["kernel"], rtol=1e-4, atol=1e-5 * scale)


def test_a_failed_root_keeps_the_last_good_pair(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=BARE)
    _, state = run(tx, grads, signals)
    updates, after = run(tx, grads, signals, poisoned(state))
    assert int(after.failures) == 1
    for side, before in zip(after.memory.sides, state.memory.sides, strict=True):
        np.testing.assert_array_equal(side.root["kernel"], before.root["kernel"])
    assert bool(jnp.isfinite(updates["kernel"]).all())


def test_the_residual_of_a_kept_pair_still_counts(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(options=BARE)
    _, state = run(tx, grads, signals)
    state = poisoned(state)._replace(root_residual=jnp.float32(0.25))
    _, after = run(tx, grads, signals, state)
    assert float(after.root_residual) == 0.25
    assert int(after.root_age) == 0  # the next try waits its turn


def test_the_residual_of_a_discarded_partner_does_not_count(layer):
    grads, signals, *_ = layer
    options = dataclasses.replace(BARE, spectrum="exact", root_method="eigenbasis")
    tx = scale_by_kronecker(options=options)
    _, state = run(tx, grads, signals)
    # The columns' basis is only near, so that its residual is above the old pair's.
    turn = np.linalg.qr(np.eye(3) + 0.02 * np.random.default_rng(1).standard_normal((3, 3)))[0]
    cols = state.memory.cols
    cols = cols._replace(root={**cols.root, "kernel": cols.root["kernel"] @ turn})
    state = poisoned(state._replace(memory=state.memory._replace(cols=cols)))
    state = state._replace(root_residual=jnp.float32(1e-9))
    _, after = run(tx, grads, signals, state)
    assert int(after.failures) >= 1
    assert float(after.root_residual) == float(state.root_residual)


def test_a_dead_layer_is_no_failure(layer):
    grads, signals, *_ = layer
    zero = jax.tree.map(jnp.zeros_like, grads)
    dead = moments(np.zeros((5, 5)), np.zeros((3, 3)), bias="['bias']")
    updates, state = run(scale_by_kronecker(), zero, {**signals, "kernel": dead})
    assert int(state.failures) == 0
    assert float(jnp.abs(updates["kernel"]).max()) == 0


def test_updates_are_bounded_by_the_change_they_make_to_outputs(layer):
    grads, signals, rows, _ = layer
    huge = jax.tree.map(lambda g: 1e6 * g, grads)
    options = dataclasses.replace(BARE, max_update=0.5)
    updates, state = run(scale_by_kronecker(options=options), huge, signals)
    # ‖U‖² tr(A)/m = (max_update)² n
    size = float(jnp.linalg.norm(updates["kernel"])) * np.sqrt(np.trace(rows) / 5)
    np.testing.assert_allclose(size, 0.5 * np.sqrt(3), rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(updates["bias"]), 0.5 * np.sqrt(3), rtol=1e-4)
    norm = optax.tree.norm(updates)
    np.testing.assert_allclose(state.update_norm, norm, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e35])
def test_bounds_hold_far_from_one(layer, size):
    grads, signals, *_ = layer
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    grads = jax.tree.map(lambda g: g / largest, grads)
    far = jax.tree.map(lambda g: size * g, grads)
    # The factors are those of size one: the update is that large too before it is bounded.
    options = dataclasses.replace(BARE, max_update=0.5 * min(1, size))
    updates, state = run(scale_by_kronecker(-0.01, options=options), far, signals)
    expected = dataclasses.replace(BARE, max_update=0.5)
    wanted, _ = run(
        scale_by_kronecker(-0.01, options=expected),
        jax.tree.map(lambda g: 1e6 * g, grads) if size > 1 else grads,
        signals,
    )
    assert int(state.failures) == 0
    for name in grads:
        np.testing.assert_allclose(updates[name], min(1, size) * wanted[name], rtol=1e-4)
    np.testing.assert_allclose(state.update_norm, min(1, size) * optax.tree.norm(wanted), rtol=1e-4)


def test_the_norm_reported_of_a_huge_update_is_finite(layer):
    grads, signals, *_ = layer
    tx = scale_by_kronecker(0.0, options=BARE)
    _, state = run(tx, jax.tree.map(lambda g: 1e25 * g, grads), signals)
    np.testing.assert_allclose(state.update_norm, 1e25 * optax.tree.norm(grads), rtol=1e-5)


def _stacked_layer(rng, num_layers, statistics):
    """A stack of layers of 4 inputs and 3 outputs, their signals and the layout."""
    view = LeafView((0,), (1,), (2,), "rows", "['b']")
    shapes = {"w": (num_layers, 4, 3), "b": (num_layers, 3)}
    layout = layout_of(
        ("['w']", shapes["w"], "kronecker", view, 0), ("['b']", shapes["b"], "bias", None, 0)
    )
    grads = {
        name: 1e6 * jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in shapes.items()
    }
    rows = np.stack([gram(rng, 4) for _ in range(num_layers)])
    cols = np.stack([gram(rng, 3) for _ in range(num_layers)])
    signals = {"w": moments(rows, cols, bias="['b']"), "b": None}
    return layout, grads, signals if statistics == "signals" else None


@pytest.mark.parametrize("statistics", ["signals", "gradient"])
def test_a_stack_of_biases_is_bounded_layer_by_layer(rng, statistics):
    layout, grads, signals = _stacked_layer(rng, 8, statistics)
    options = dataclasses.replace(BARE, max_update=0.5)
    tx = scale_by_kronecker(-0.01, statistics=statistics, layout=layout, options=options)
    updates, _ = run(tx, grads, signals)
    norms = jnp.linalg.norm(updates["b"], axis=-1)
    np.testing.assert_allclose(norms, np.full(8, 0.5 * np.sqrt(3)), rtol=1e-5)


@pytest.mark.parametrize("known", ["layout", "signals", "gradient"])
def test_a_bias_of_two_axes_is_bounded_by_all_outputs_of_its_layer(rng, known):
    view = LeafView((), (0,), (1, 2), "rows", "['b']")
    layout = layout_of(
        ("['w']", (4, 2, 3), "kronecker", view, 0), ("['b']", (2, 3), "bias", None, 0)
    )
    grads = {"w": jnp.ones((4, 2, 3)), "b": 1e6 * jnp.ones((2, 3))}
    if known == "signals":  # the kernel has two axes: no layout is needed
        layout, grads["w"] = None, jnp.ones((4, 6))
    statistics = "gradient" if known == "gradient" else "signals"
    signals = {"w": moments(gram(rng, 4), gram(rng, 6), bias="['b']"), "b": None}
    options = dataclasses.replace(BARE, max_update=0.5)
    tx = scale_by_kronecker(-0.01, statistics=statistics, layout=layout, options=options)
    updates, _ = run(tx, grads, None if known == "gradient" else signals)
    np.testing.assert_allclose(jnp.linalg.norm(updates["b"]), 0.5 * np.sqrt(6), rtol=1e-5)
