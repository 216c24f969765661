"""The Kronecker form with a layout: views, stacks, joint biases, and layouts that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optalr.signals.moments import LeafView
from optalr.transforms.kronecker.transform import (
    scale_by_kronecker,
)
from tests.transforms.kronecker_layers import (
    BARE,
    gram,
    layout_of,
    moments,
    power_of,
    relative,
    run,
)


def test_signals_that_do_not_fit_ask_for_a_layout(rng):
    grads = {"w": jnp.ones((2, 3, 4))}
    signals = {"w": moments(gram(rng, 2), gram(rng, 12))}
    with pytest.raises(ValueError, match=r"\['w'\].*\(2, 3, 4\).*layout=optalr.coverage"):
        run(scale_by_kronecker(), grads, signals)


def test_a_layout_says_how_a_leaf_is_a_matrix(rng):
    view = LeafView((), (0,), (1, 2), "rows", "['b']")
    layout = layout_of(
        ("['w']", (4, 2, 3), "kronecker", view, 0), ("['b']", (2, 3), "bias", None, 0)
    )
    grads = {
        "w": jnp.asarray(rng.standard_normal((4, 2, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32),
    }
    rows, cols = gram(rng, 4), gram(rng, 6)
    signals = {"w": moments(rows, cols, bias="['b']"), "b": None}
    updates, _ = run(scale_by_kronecker(layout=layout, options=BARE), grads, signals)
    flat = {"w": grads["w"].reshape(4, 6), "b": grads["b"].reshape(6)}
    expected, _ = run(scale_by_kronecker(options=BARE), flat, signals)
    for name in grads:
        np.testing.assert_allclose(
            updates[name].reshape(-1), expected[name].reshape(-1), rtol=1e-5, atol=1e-6
        )


def test_signals_under_other_key_paths_are_refused(rng):
    view = LeafView((), (0,), (1,), "rows", "['b']")
    layout = layout_of(("['w']", (4, 3), "kronecker", view, 0), ("['b']", (3,), "bias", None, 0))
    grads = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    signals = {"w": moments(gram(rng, 4), gram(rng, 3), bias="['b']"), "b": None}
    tx = scale_by_kronecker(layout=layout)
    elsewhere = r"(?s)\['w'\] is captured.*signals.*\['net'\]\['w'\].*value_grad_and_extras"
    with pytest.raises(ValueError, match=elsewhere):
        run(tx, grads, {"net": signals})
    with pytest.raises(ValueError, match=r"\['w'\] is captured.*only for: none"):
        run(tx, grads, {"w": None, "b": None})
    run(tx, grads, jax.tree.map(jnp.zeros_like, signals))  # not captured in this batch
    for name in grads:  # whole signals, some of the updates
        part = optax.masked(tx, {key: key == name for key in grads})
        run(part, grads, signals)
    shampoo = scale_by_kronecker(layout=layout, statistics="gradient")
    run(shampoo, grads, None)


def test_a_stack_of_layers_equals_layers_one_by_one(rng):
    view = LeafView((0,), (1,), (2,), "rows", "['b']")
    layout = layout_of(
        ("['w']", (2, 4, 3), "kronecker", view, 0), ("['b']", (2, 3), "bias", None, 0)
    )
    grads = {
        "w": jnp.asarray(rng.standard_normal((2, 4, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32),
    }
    rows = np.stack([gram(rng, 4), gram(rng, 4, 10)])
    cols = np.stack([gram(rng, 3), gram(rng, 3, 0.1)])
    options = dataclasses.replace(BARE, max_update=0.5)
    signals = {"w": moments(rows, cols, bias="['b']"), "b": None}
    updates, _ = run(scale_by_kronecker(layout=layout, options=options), grads, signals)
    for i in range(2):
        one = {"w": moments(rows[i], cols[i], bias="['b']"), "b": None}
        expected, _ = run(
            scale_by_kronecker(options=options), jax.tree.map(lambda g, i=i: g[i], grads), one
        )
        for name in grads:
            np.testing.assert_allclose(updates[name][i], expected[name], rtol=1e-4, atol=1e-6)


def test_a_joint_bias_is_one_more_row(rng):
    view = LeafView((), (0,), (1,), "rows", "['b']")
    layout = layout_of(("['w']", (4, 3), "kronecker", view, 0), ("['b']", (3,), "bias", None, 0))
    grads = {
        "w": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(3), jnp.float32),
    }
    inputs = np.concatenate([rng.standard_normal((50, 4)), np.ones((50, 1))], 1)
    whole, cols = inputs.T @ inputs / 50, gram(rng, 3)
    signals = {
        "w": moments(whole[:4, :4], cols, bias="['b']", mean=whole[:4, 4].astype(np.float32)),
        "b": None,
    }
    options = dataclasses.replace(BARE, joint_bias=True)
    tx = scale_by_kronecker(layout=layout, damping=1e-2, options=options)
    updates, state = run(tx, grads, signals)
    joint = np.concatenate([grads["w"], grads["b"][None]])
    expected = power_of(relative(whole, 1e-2), -0.5) @ joint @ power_of(relative(cols, 1e-2), -0.5)
    got = np.concatenate([updates["w"], updates["b"][None]])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert state.memory.rows.factor["w"].shape == (5, 5)


def test_a_layout_of_other_parameters_is_refused():
    layout = layout_of(("['w']", (4, 3), "diagonal", None, 0))
    with pytest.raises(ValueError, match=r"layout has no leaf \['v'\]"):
        scale_by_kronecker(layout=layout).init({"v": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match=r"layout describes \['w'\] with shape \(4, 3\)"):
        scale_by_kronecker(layout=layout).init({"w": jnp.ones((4, 2))})
