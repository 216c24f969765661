"""The learned learning rate: the rule and its derivatives against float64 references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr
from optalr import FiniteDifferences
from optalr.signals.ray import inner_product, loss_along
from tests.transforms.compiling import quick_jit
from tests.transforms.learned_rate.problems import network, one_step, quadratic, traced_step


def test_one_update_by_hand():
    # L = w₁² + 2 w₂², w = (1, 1), g = (2, 4), f(η) = (1−2η)² + 2(1−4η)², f' = −20 + 72η, f'' = 72.
    loss = lambda w: w[0] ** 2 + 2 * w[1] ** 2  # noqa: E731
    w, state = one_step(optalr.scale_by_learned_rate(0.1), loss, jnp.ones(2))
    np.testing.assert_allclose(w, [0.8, 0.6], rtol=1e-6)  # moved with the rate at hand
    np.testing.assert_allclose(state.learning_rate, 0.1)
    np.testing.assert_allclose(state.next_rate, 20 / 72, rtol=1e-6)
    np.testing.assert_allclose([state.ray_slope, state.ray_curvature], [-12.8, 72], rtol=1e-5)

    first = optalr.scale_by_learned_rate(0.1, order=1, meta_rate=0.001)
    w, state = one_step(first, loss, jnp.ones(2))
    np.testing.assert_allclose(w, [0.8, 0.6], rtol=1e-6)
    np.testing.assert_allclose(state.next_rate, 0.1 + 0.001 * 12.8, rtol=1e-6)


@pytest.mark.parametrize("eta", [1e-6, 1e-3, 0.1, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("double", [False, True])
def test_one_newton_update_is_the_exact_line_search_on_a_quadratic(eta, double):
    with jax.enable_x64(double):
        loss, hessian, w = quadratic()
        w = w.astype(jnp.float64 if double else jnp.float32)
        g = np.asarray(jax.grad(loss)(w), np.float64)
        exact = g @ g / (g @ hessian @ g)
        moved, state = one_step(optalr.scale_by_learned_rate(eta), loss, w)
        np.testing.assert_allclose(moved, w - jnp.float32(eta) * g, rtol=1e-5)
        # In float32 the difference η − f'/f'' is known to a few roundings of η.
        tolerance = 1e-6 if double else 1e-5 + 4e-7 * eta / exact
        np.testing.assert_allclose(state.next_rate, exact, rtol=tolerance)
        assert int(state.nonconvex_probes) == int(state.failures) == int(state.runaway_steps) == 0


def test_with_its_lag_the_newton_rule_is_barzilai_borwein_and_without_it_steepest_descent(x64):
    loss, hessian, w = quadratic(size=8)
    w = w.astype(jnp.float64)
    slope = jax.grad(loss)
    w_bb, w_sd, g_old, rate = w, w, None, 0.01
    lagging = optalr.scale_by_learned_rate(0.01)
    prompt = optalr.scale_by_learned_rate(0.01, lag=False)
    w_lag, s_lag, w_now, s_now = w, None, w, None
    for _ in range(10):
        g = np.asarray(slope(w_bb))
        rate = 0.01 if g_old is None else g_old @ g_old / (g_old @ hessian @ g_old)
        w_bb, g_old = w_bb - rate * g, g
        d = np.asarray(slope(w_sd))
        w_sd = w_sd - d @ d / (d @ hessian @ d) * d
        w_lag, s_lag = one_step(lagging, loss, w_lag, s_lag)
        w_now, s_now = one_step(prompt, loss, w_now, s_now)
        np.testing.assert_allclose(s_lag.learning_rate, rate, rtol=1e-6)
    np.testing.assert_allclose(w_lag, w_bb, rtol=1e-4, atol=1e-5)  # rates are float32
    np.testing.assert_allclose(w_now, w_sd, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e3])
def test_order_two_is_invariant_under_the_scale_of_the_loss_and_order_one_is_not(scale):
    def steps(order, factor):
        loss_fn, w, batch = network()
        loss = lambda p: factor * loss_fn(p, *batch)  # noqa: E731
        tx = optalr.learned_rate_sgd(0.05 / factor, order=order)
        state = None
        for _ in range(6):
            w, state = one_step(tx, loss, w, state)
        return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(w)]), state

    (w1, s1), (w2, s2) = steps(2, 1.0), steps(2, scale)
    np.testing.assert_allclose(w1, w2, rtol=2e-3, atol=2e-3)
    rates = [optalr.metrics(s)["learning_rate"] for s in (s1, s2)]
    np.testing.assert_allclose(rates[0], rates[1] * scale, rtol=2e-2)
    (w1, _), (w2, _) = steps(1, 1.0), steps(1, scale)
    assert np.abs(w1 - w2).max() > 1e-5


@functools.partial(quick_jit, static_argnums=(0, 1))
def read_along_the_gradient(derivatives, loss_fn, params, grads, batch, eta):
    ray = loss_along(lambda p: loss_fn(p, *batch), params, grads)
    return derivatives.measure(ray, eta)


@functools.partial(quick_jit, static_argnums=0)
def reference_along_the_gradient(loss_fn, params, grads, batch, eta):
    """Return f, f' and f'' from the loss's gradient and Hessian at w − ηg."""
    moved = jax.tree.map(lambda w, u: w - eta * u, params, grads)
    slope, curvature = jax.jvp(jax.grad(lambda q: loss_fn(q, *batch)), (moved,), (grads,))
    return loss_fn(moved, *batch), -inner_product(slope, grads), inner_product(curvature, grads)


def test_exact_derivatives_against_float64_products_and_differences_against_theory():
    loss_fn, params, batch = network(1)
    grads = jax.grad(loss_fn)(params, *batch)
    readers = optalr.ExactDerivatives(), FiniteDifferences(1e-5), FiniteDifferences(1e-2)
    for eta in (0.01, 0.1, 1.0):
        exact, noisy, fair = (
            read_along_the_gradient(reader, loss_fn, params, grads, batch, jnp.float32(eta))
            for reader in readers
        )
        with jax.enable_x64(True):
            doubles = jax.tree.map(
                lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
                (params, grads, batch, jnp.float32(eta)),
            )
            expected = reference_along_the_gradient(loss_fn, *doubles)
            found = [read_along_the_gradient(reader, loss_fn, *doubles) for reader in readers]
            np.testing.assert_allclose(found[0], expected, rtol=1e-10)
            np.testing.assert_allclose(found[1], expected, rtol=1e-4)
            expected = [float(x) for x in expected]
        np.testing.assert_allclose(exact, expected, rtol=2e-4)
        assert abs(noisy.curvature - expected[2]) > 0.5 * abs(expected[2])  # pure rounding
        np.testing.assert_allclose(fair.curvature, expected[2], rtol=0.2, atol=0.02)


def test_finite_differences_are_the_papers_five_values_with_smoothing(x64):
    f = lambda eta: jnp.exp(-eta) + eta**2  # noqa: E731
    eta, eps = 0.3, 1e-3
    values = [float(f(eta + k * eps)) for k in (-2, -1, 0, 1, 2)]
    found = FiniteDifferences(eps, smoothing=0.0).measure(f, jnp.float64(eta))
    expected = (values[4] + values[0] - 2 * values[2]) / (4 * eps**2)
    np.testing.assert_allclose(found.slope, (values[3] - values[1]) / (2 * eps), rtol=1e-12)
    np.testing.assert_allclose(found.curvature, expected, rtol=1e-12)
    relative = FiniteDifferences(eps / eta, relative=True, smoothing=0.0)
    np.testing.assert_allclose(relative.measure(f, jnp.float64(eta)), found, rtol=1e-7)
    flat = FiniteDifferences(eps, smoothing=1e-6).measure(lambda eta: 0 * eta, jnp.float64(eta))
    np.testing.assert_allclose(flat.curvature, 1e-6 / (4 * eps**2), rtol=1e-12)
    smooth = optalr.ExactDerivatives(smoothing=0.5).measure(lambda eta: -eta, jnp.float64(eta))
    assert float(smooth.curvature) == 0.5


def test_successive_gradients_follow_equation_8():
    loss, _, w = quadratic()
    tx = optalr.scale_by_learned_rate(
        0.01, order=1, meta_rate=1e-3, derivatives="successive_gradients"
    )
    state, rate, g_old, expected = None, 0.01, None, w
    for _ in range(5):
        g = np.asarray(jax.grad(loss)(expected))
        rate = rate if g_old is None else rate + 1e-3 * g_old @ g
        expected, g_old = expected - rate * g, g
        w, state = one_step(tx, loss, w, state)
        np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-5)
    np.testing.assert_allclose(w, expected, rtol=1e-4, atol=1e-6)
    # The same rates as the exact first-order rule takes with its probes.
    probing, state2, w2 = optalr.scale_by_learned_rate(0.01, order=1), None, quadratic()[2]
    for _ in range(5):
        w2, state2 = one_step(probing, loss, w2, state2)
    np.testing.assert_allclose(state2.learning_rate, rate, rtol=1e-5)


def test_momentum_on_the_rate():
    loss, hessian, w = quadratic()
    free = optalr.RateSafeguards(max_drag=None)  # which would keep it below Newton's rate
    tx = optalr.scale_by_learned_rate(0.05, rate_momentum=0.5, safeguards=free)
    rate, velocity, state = 0.05, 0.0, None
    for _ in range(4):
        g = np.asarray(jax.grad(loss)(w))
        velocity = 0.5 * velocity + g @ g / (g @ hessian @ g) - rate
        w, state = one_step(tx, loss, w, state)
        np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-4)
        rate = rate + velocity
    np.testing.assert_allclose(state.velocity, velocity, rtol=1e-3)


def test_an_interval_between_rate_updates():
    loss, _, w = quadratic()
    tx, state, rates = optalr.scale_by_learned_rate(0.02, every=3), None, []
    step = quick_jit(lambda w, s: traced_step(tx, loss, w, s))
    state = tx.init(w)
    for _ in range(7):
        w, state = step(w, state)
        rates.append(float(state.learning_rate))
    assert rates[0] == pytest.approx(0.02)
    assert rates[1] == rates[2] == rates[3] != rates[0]
    assert rates[4] == rates[5] == rates[6] != rates[3]


def test_the_probe_may_be_another_batch():
    loss, _, w = quadratic()
    other, other_hessian, _ = quadratic(seed=1)
    tx = optalr.scale_by_learned_rate(0.01, probe="validation_value_fn")
    g = np.asarray(jax.grad(loss)(w))
    _, state = one_step(tx, loss, w, validation_value_fn=Partial(other))
    expected = g @ np.asarray(jax.grad(other)(w)) / (g @ other_hessian @ g)
    np.testing.assert_allclose(state.next_rate, expected, rtol=1e-4)
    with pytest.raises(TypeError, match="validation_value_fn"):
        one_step(tx, loss, w)


def test_never_computes_what_the_gradient_did_not_ask_for():
    """Five products a layer against the gradient's three: 8/3 of a gradient step's flops."""
    width = 128
    keys = jax.random.split(jax.random.key(0), 6)
    params = [jax.random.normal(k, (width, width)) / width**0.5 for k in keys[:5]]
    x = jax.random.normal(keys[5], (width, width))

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    evaluate = optalr.value_grad_and_extras(loss_fn)

    def flops(tx):
        def step(params, state, x):
            _, grads, extras = evaluate(params, x, signals=False)
            updates, state = tx.update(grads, state, params, **extras)
            return optax.apply_updates(params, updates), state

        cost = jax.jit(step).lower(params, tx.init(params), x).compile().cost_analysis()
        return cost["flops"]

    sgd, learned = flops(optax.sgd(0.1)), flops(optalr.learned_rate_sgd(0.1))
    differences = flops(optalr.learned_rate_sgd(0.1, derivatives="finite_differences"))
    assert learned <= 2.9 * sgd
    assert learned <= differences * 1.02
    cheap = flops(optalr.learned_rate_sgd(0.1, order=1, derivatives="successive_gradients"))
    assert cheap <= 1.05 * sgd
