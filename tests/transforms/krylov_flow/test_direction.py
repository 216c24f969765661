"""The direction of the flow against dense solves, and on all kinds of parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import optalr
from optalr import LevenbergMarquardt, scale_by_krylov_flow
from tests.transforms.compiling import quick_jit
from tests.transforms.krylov_flow.problems import (
    LOSS,
    compiled_direction,
    dense,
    direction_of,
    evaluate_jitted,
    make_batch,
    make_params,
    squared,
)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("damping", [(0.0, 1.0), (1.0, 1.0), (0.3, 0.0)])
def test_direction_is_scipys_minres_of_the_dense_matrix(curvature, num_steps, damping):
    gradient, matrix = dense(curvature)
    shift = damping[0] * np.linalg.norm(gradient) ** damping[1]
    expected = scipy.sparse.linalg.minres(
        matrix, gradient, shift=-shift, rtol=0.0, maxiter=num_steps
    )[0]
    direction, state = compiled_direction(curvature, num_steps)(damping)
    np.testing.assert_allclose(ravel_pytree(direction)[0], expected, rtol=1e-3, atol=1e-4)
    residual = gradient - matrix @ expected - shift * expected
    np.testing.assert_allclose(state.damping, shift, rtol=1e-5)
    np.testing.assert_allclose(
        state.krylov_residual, np.linalg.norm(residual) / np.linalg.norm(gradient), rtol=1e-3
    )


def test_one_step_is_algorithm_2_by_hand():
    # L = ½(w₁² + 2·w₂²) at (1, 1): g = (1, 2), G = diag(1, 2), u = (1, 4) + |g|·(1, 2).
    loss = optalr.composite_loss(lambda w: jnp.array([1.0, np.sqrt(2)]) * w, squared)
    _, grads, extras = optalr.value_grad_and_extras(loss)(jnp.ones(2))
    direction, _ = scale_by_krylov_flow().update(
        grads, scale_by_krylov_flow().init(grads), **extras
    )
    g = np.array([1.0, 2.0])
    u = np.array([1.0, 4.0]) + np.sqrt(5) * g
    np.testing.assert_allclose(direction, (g @ u) / (u @ u) * g, rtol=1e-5)


def test_linear_least_squares_is_solved_in_one_step():
    X = jax.random.normal(jax.random.key(0), (20, 5))
    y = jax.random.normal(jax.random.key(1), (20,))
    loss = optalr.composite_loss(lambda w: X @ w - y, squared)
    w = jnp.ones(5)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    tx = optalr.edf(1.0, num_steps=5, damping=(0.0, 1.0))
    updates, _ = tx.update(grads, tx.init(w), w, **extras)
    exact = np.linalg.lstsq(np.asarray(X), np.asarray(y), rcond=None)[0]
    np.testing.assert_allclose(optax.apply_updates(w, updates), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damping", [(0.0, 1.0), (1.0, 1.0), LevenbergMarquardt()])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_zero_gradient_gives_a_zero_update(damping, num_steps):
    loss = optalr.composite_loss(lambda w: w, squared)
    w = jnp.zeros(3)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    tx = scale_by_krylov_flow(num_steps=num_steps, damping=damping)
    direction, state = tx.update(grads, tx.init(w), w, **extras)
    assert not np.any(direction)
    assert int(state.failures) == 0
    assert np.isfinite(state.next_damping)


def test_negative_curvature_descends_unless_the_paper_is_followed():
    # A saddle: along the gradient at (0.1, 1) the curvature is negative.
    def saddle(w):
        return 0.5 * w[0] ** 2 - 0.5 * w[1] ** 2 + 0.25 * jnp.sum(w**4) * 0.1

    evaluate = optalr.value_grad_and_extras(saddle)
    w = jnp.array([0.1, 1.0])
    _, grads, extras = evaluate(w)
    for num_steps in (1, 2):
        kwargs = {"curvature": "hessian", "num_steps": num_steps, "damping": (0.0, 1.0)}
        descend, state = scale_by_krylov_flow(**kwargs).update(
            grads, scale_by_krylov_flow(**kwargs).init(w), w, **extras
        )
        assert float(jnp.vdot(descend, grads)) > 0
        assert int(state.negative_curvature) == 1
        keep = scale_by_krylov_flow(**kwargs, negative_curvature="keep")
        assert float(jnp.vdot(keep.update(grads, keep.init(w), w, **extras)[0], grads)) < 0
    tx = optalr.edf(0.5, curvature="hessian", num_steps=2, damping=(0.01, 0.0))
    state = tx.init(w)

    @quick_jit
    def step(w, state):
        value, grads, extras = evaluate(w)
        updates, state = tx.update(grads, state, w, **extras)
        return optax.apply_updates(w, updates), state, value

    for _ in range(40):
        w, state, value = step(w, state)
    assert float(value) < -2.4  # the minima lie at w₂² = 10


def test_products_on_a_subsample_change_the_solve_only():
    x, y = make_batch()
    params = make_params()
    _, grads, extras = evaluate_jitted(params, x, y)
    sub = optalr.curvature_products(LOSS, params, x[:4], y[:4])
    tx = scale_by_krylov_flow(damping=(0.1, 0.0))
    direction, _ = tx.update(grads, tx.init(params), params, **(extras | sub))
    g, _ = ravel_pytree(grads)
    u = ravel_pytree(sub["gauss_newton"](grads))[0] + 0.1 * g
    np.testing.assert_allclose(
        ravel_pytree(direction)[0], (g @ u) / (u @ u) * g, rtol=1e-4, atol=1e-6
    )


def test_sequence_outputs_are_solved_like_any_other():
    # Batch x time x classes, the loss a mean over positions of which some are padding.
    x, y = make_batch(n=12)
    x, y = x.reshape(3, 4, 4), y.reshape(3, 4, 3)
    mask = jnp.arange(4)[None] < jnp.array([4, 2, 3])[:, None]

    def net(params, x, y):
        return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"][None, None]

    def masked(z, x, y):
        return -jnp.sum(mask[..., None] * y * jax.nn.log_softmax(z)) / jnp.sum(mask)

    params = make_params()
    tx = scale_by_krylov_flow(num_steps=3, damping=(0.1, 0.0))
    sequences = optalr.value_grad_and_extras(optalr.composite_loss(net, masked))
    _, grads, extras = quick_jit(sequences)(params, x, y)
    update = quick_jit(tx.update)
    found, _ = update(grads, tx.init(params), params, **extras)
    # The same positions as nine examples of their own.
    _, grads, extras = evaluate_jitted(params, x[mask], y[mask])
    flat, _ = update(grads, tx.init(params), params, **extras)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, flat)


@pytest.mark.parametrize("damping", [(1.0, 1.0), LevenbergMarquardt()])
def test_python_numbers_are_parameters_like_any_other(damping):
    loss = optalr.composite_loss(lambda w: jnp.stack([w["a"], 2 * w["b"]]), squared)
    found = []
    for params in ({"a": 3.0, "b": 1.0}, {"a": jnp.float32(3.0), "b": jnp.float32(1.0)}):
        _, grads, extras = optalr.value_grad_and_extras(loss)(params)
        tx = optalr.edf(0.5, num_steps=2, damping=damping, acceleration="W2")
        updates, _ = tx.update(grads, tx.init(params), params, **extras)
        found.append([float(updates["a"]), float(updates["b"])])
    np.testing.assert_allclose(*found, rtol=1e-6)


def test_num_steps_may_be_a_numpy_integer():
    found, _ = direction_of(scale_by_krylov_flow(num_steps=np.int64(2)))
    expected, _ = direction_of(scale_by_krylov_flow(num_steps=2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_update_dtype_follows_the_gradient():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    direction, state = direction_of(scale_by_krylov_flow(num_steps=2), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(direction)} == {jnp.dtype(jnp.bfloat16)}
    assert state.damping.dtype == jnp.float32
    exact, _ = direction_of(scale_by_krylov_flow(num_steps=2))
    d, e = ravel_pytree(direction)[0].astype(jnp.float32), ravel_pytree(exact)[0]
    assert float(jnp.linalg.norm(d - e) / jnp.linalg.norm(e)) < 0.1
