"""The flow on a part of the parameters, and with other links before and after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg

import optalr
from optalr import LevenbergMarquardt, scale_by_krylov_flow
from tests.transforms.krylov_flow.problems import (
    dense,
    direction_of,
    evaluate_jitted,
    make_batch,
    make_params,
    squared,
    train,
)


@pytest.mark.parametrize("wrapped", ["masked", "partition"])
def test_masked_leaves_are_held_fixed_in_the_solve(wrapped):
    gradient, matrix = dense("gauss_newton")
    free = np.r_[np.zeros(3, bool), np.ones(20, bool), np.zeros(15, bool)]
    expected = scipy.sparse.linalg.minres(
        matrix[np.ix_(free, free)], gradient[free], shift=-0.2, rtol=0.0, maxiter=3
    )[0]
    inner = scale_by_krylov_flow(num_steps=3, damping=(0.2, 0.0))
    labels = {"b": "no", "w1": "yes", "w2": "no"}
    if wrapped == "masked":
        tx = optax.masked(inner, {name: label == "yes" for name, label in labels.items()})
    else:
        tx = optax.partition({"yes": inner, "no": optax.set_to_zero()}, labels)
    direction, _ = direction_of(tx)
    np.testing.assert_allclose(direction["w1"].ravel(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damping", [(1.0, 1.0), LevenbergMarquardt()])
@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_a_flow_without_leaves_leaves_the_rest_alone(wrap, damping):
    flow = scale_by_krylov_flow(num_steps=2, damping=damping)
    if wrap == "masked":
        tx = optax.masked(flow, dict.fromkeys(("b", "w1", "w2"), False))
    else:
        rest = {"flow": flow, "sgd": optax.sgd(0.1)}
        tx = optax.partition(rest, dict.fromkeys(("b", "w1", "w2"), "sgd"))
    direction, state = direction_of(tx)
    _, grads, _ = evaluate_jitted(make_params(), *make_batch())
    factor = 1.0 if wrap == "masked" else -0.1
    for found, grad in zip(jax.tree.leaves(direction), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, factor * grad, rtol=1e-5, atol=1e-7)
    metrics = optalr.metrics(state)
    assert int(metrics["failures"]) == 0
    assert float(metrics["krylov_residual"]) == 0.0
    assert float(metrics["damping"]) == (1.0 if isinstance(damping, LevenbergMarquardt) else 0.0)


@pytest.mark.parametrize(
    "chain",
    [
        lambda flow: optax.chain(flow, optax.clip_by_global_norm(1.0), optax.scale(-0.5)),
        lambda flow: optax.chain(optax.clip_by_global_norm(5.0), flow, optax.scale(-0.5)),
        lambda flow: optax.chain(flow, optax.trace(0.5), optax.scale(-0.3)),
        lambda flow: optax.inject_hyperparams(
            optalr.two_stage, static_args=("first", "second"), hyperparam_dtype=jnp.float32
        )(
            optax.chain(flow, optalr.scale_by_recorded_rate(0.5)),
            optax.sgd(0.1),
            phase=optalr.switch_at(5),
        ),
    ],
    ids=["clipped after", "clipped before", "momentum", "two stages"],
)
def test_composes_and_descends(chain):
    values, _ = train(chain(scale_by_krylov_flow(num_steps=2, damping=(0.1, 0.0))), 10)
    assert values[-1] < values[0]
    assert all(np.isfinite(values))


def test_learned_rate_sets_the_length_of_the_flow():
    flow = scale_by_krylov_flow(num_steps=2, damping=(0.1, 0.0))
    values, _ = train(optax.chain(flow, optalr.scale_by_learned_rate(0.5)), 8)
    assert values[-1] < values[0]


def test_learned_rate_without_lag_is_an_exact_line_search_along_the_flow():
    X = jax.random.normal(jax.random.key(0), (20, 5))
    loss = optalr.composite_loss(lambda w: X @ w - 1.0, squared)
    tx = optax.chain(
        scale_by_krylov_flow(num_steps=2, damping=(1.0, 1.0)),
        optalr.scale_by_learned_rate(0.3, lag=False),
    )
    w = jnp.ones(5)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    updates, _ = tx.update(grads, tx.init(w), w, **extras)
    # A search is exact where the new gradient is orthogonal to the step.
    slope = float(jnp.vdot(jax.grad(loss)(w + updates), updates))
    assert abs(slope) < 1e-4 * abs(float(jnp.vdot(grads, updates)))


def test_w1_is_momentum_on_the_solved_direction():
    loss = optalr.composite_loss(lambda w: jnp.array([1.0, 2.0]) * w, squared)
    tx = optalr.edf(0.1, acceleration="W1", damping=(0.0, 1.0))
    plain = scale_by_krylov_flow(damping=(0.0, 1.0))
    w, velocity = jnp.ones(2), jnp.zeros(2)
    state = tx.init(w)
    for _ in range(3):
        _, grads, extras = optalr.value_grad_and_extras(loss)(w)
        updates, state = tx.update(grads, state, w, **extras)
        velocity = 0.9 * velocity + plain.update(grads, plain.init(w), w, **extras)[0]
        np.testing.assert_allclose(updates, -0.1 * velocity, rtol=1e-5)
        w = optax.apply_updates(w, updates)


@pytest.mark.parametrize("acceleration", [None, "W1", "W2"])
def test_recipe_falls_faster_than_gradient_descent(acceleration):
    values, state = train(optalr.edf(1.0, num_steps=3, acceleration=acceleration), 15)
    reference, _ = train(optax.sgd(0.5), 15)
    assert values[-1] < reference[-1]
    assert {"learning_rate", "damping", "failures"} <= set(optalr.metrics(state))
