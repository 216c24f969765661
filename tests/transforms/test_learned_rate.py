"""The learned learning rate: the rule against float64 references, its safeguards, its company."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr
from optalr import FiniteDifferences, RateSafeguards
from optalr.signals.ray import inner_product, loss_along

MODES = [
    {"order": 2},
    {"order": 1},
    {"order": 2, "derivatives": FiniteDifferences(step=1e-2, relative=True)},
    {"order": 1, "derivatives": "successive_gradients"},
]


def quadratic(seed=0, size=6, scale=1.0):
    """Return (loss, H, w): ``scale`` times ½ (w−w*)ᵀH(w−w*), positive definite."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    hessian = (root @ root.T / size + np.eye(size)) * scale
    target, start = rng.normal(size=(2, size))

    def loss(w):
        offset = w - jnp.asarray(target, w.dtype)
        return 0.5 * offset @ jnp.asarray(hessian, w.dtype) @ offset

    return loss, hessian, jnp.asarray(start)


def network(key=0, dtype=jnp.float32, width=8):
    """Return (loss_fn(params, x, y), params, (x, y)) of a two-layer tanh network."""
    keys = jax.random.split(jax.random.key(key), 4)
    params = {
        "hidden": {
            "w": jax.random.normal(keys[0], (5, width), dtype),
            "b": jnp.zeros(width, dtype),
        },
        "out": {"w": jax.random.normal(keys[1], (width, 3), dtype) / 3, "b": jnp.zeros(3, dtype)},
    }
    batch = jax.random.normal(keys[2], (16, 5), dtype), jax.random.randint(keys[3], (16,), 0, 3)

    def loss_fn(p, x, y):
        hidden = jnp.tanh(x @ p["hidden"]["w"] + p["hidden"]["b"][None])
        scores = hidden @ p["out"]["w"] + p["out"]["b"][None]
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    return loss_fn, params, batch


def one_step(tx, loss, w, state=None, **extras):
    return _one_step(tx, loss, w, tx.init(w) if state is None else state, extras)


def traced_step(tx, loss, w, state):
    value, grads = jax.value_and_grad(loss)(w)
    updates, state = tx.update(grads, state, w, value_fn=Partial(loss), value=value, grad=grads)
    return optax.apply_updates(w, updates), state


# The programs are small and many: compiling them is all the time that these tests take.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=(0, 1))
def _one_step(tx, loss, w, state, extras):
    value, grads = jax.value_and_grad(loss)(w)
    given = {"value_fn": Partial(loss), "value": value, "grad": grads, **extras}
    updates, state = tx.update(grads, state, w, **given)
    return optax.apply_updates(w, updates), state


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


@functools.partial(jit, static_argnums=(0, 1))
def read_along_the_gradient(derivatives, loss_fn, params, grads, batch, eta):
    ray = loss_along(lambda p: loss_fn(p, *batch), params, grads)
    return derivatives.measure(ray, eta)


@functools.partial(jit, static_argnums=0)
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
    tx = optalr.scale_by_learned_rate(0.05, rate_momentum=0.5)
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
    step = jit(lambda w, s: traced_step(tx, loss, w, s))
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


def test_safeguard_where_the_curvature_is_not_positive():
    w = jnp.array([1.0])
    hill = lambda w: -(w[0] ** 2)  # noqa: E731  (g = −2, f = −(1+2η)², f' < 0, f'' < 0)
    _, state = one_step(optalr.scale_by_learned_rate(0.25), hill, w)
    assert float(state.next_rate) == 0.5
    assert int(state.nonconvex_probes) == 1
    assert int(optalr.metrics(state)["nonconvex_probes"]) == 1
    bare = optalr.scale_by_learned_rate(0.25, safeguards=None)
    _, state = one_step(bare, hill, w)  # climbs: −f'/f'' leads back to η = −½, floored at δ
    assert float(state.next_rate) == pytest.approx(1e-6)
    assert int(state.clipped_rates) == 1
    bump = lambda w: jnp.cos(w[0])  # noqa: E731  (from 0.1 with u = −sin 0.1; η = 50 is past π)
    _, state = one_step(optalr.scale_by_learned_rate(50.0), bump, jnp.array([0.1]))
    assert float(state.next_rate) < 50


def test_safeguard_against_probes_that_are_not_finite():
    wall = lambda w: jnp.where(w[0] > 0, w[0] - jnp.log(w[0]), jnp.nan)  # noqa: E731
    w = jnp.array([3.0])
    tx = optalr.scale_by_learned_rate(100.0)
    moved, state = one_step(tx, wall, w)
    assert float(moved[0]) == 3.0
    assert float(state.next_rate) == pytest.approx(10.0)
    assert float(state.learning_rate) == 0.0
    assert int(optalr.metrics(state)["failures"]) == 1
    for _ in range(10):
        moved, state = one_step(tx, wall, moved, state)
        assert np.isfinite(float(wall(moved)))
    assert float(state.average_rate) < 30
    _, state = one_step(optalr.scale_by_learned_rate(100.0, safeguards=None), wall, w)
    assert np.isnan(float(state.next_rate))
    # A second derivative that is infinite does not stop the run, nor change the rate.
    kink = lambda w: jnp.sum(jnp.where(w >= 0, w, 0) ** 1.5) + w[0]  # noqa: E731
    moved, state = one_step(optalr.scale_by_learned_rate(1.0), kink, jnp.array([1.0]) * 0)
    assert np.isfinite(float(state.next_rate))


def test_a_direction_that_is_not_finite_gives_a_zero_update():
    loss, _, w = quadratic()
    tx = optalr.scale_by_learned_rate(0.01)
    bad = jnp.full_like(w, jnp.nan)
    updates, state = tx.update(bad, tx.init(w), w, value_fn=Partial(loss))
    np.testing.assert_array_equal(updates, jnp.zeros_like(w))
    np.testing.assert_array_equal([state.next_rate, state.failures], [jnp.float32(0.01), 1])


def test_safeguard_against_runaway_rates():
    loss, hessian, w = quadratic()
    g = np.asarray(jax.grad(loss)(w))
    best = g @ g / (g @ hessian @ g)
    tx = optalr.scale_by_learned_rate(1e6)
    moved, state = one_step(tx, loss, w)
    np.testing.assert_allclose([state.learning_rate, state.next_rate], best, rtol=1e-4)
    assert loss(moved) < loss(w)
    assert int(optalr.metrics(state)["runaway_steps"]) == 1
    tight = optalr.scale_by_learned_rate(8 * best, safeguards=RateSafeguards(runaway=2.9))
    assert int(one_step(tight, loss, w)[1].runaway_steps) == 1  # ratio η/2η* − 1 = 3
    off = optalr.scale_by_learned_rate(1e6, safeguards=RateSafeguards(runaway=None))
    _, state = one_step(off, loss, w)
    np.testing.assert_allclose(state.learning_rate, 1e6)
    capped = optalr.scale_by_learned_rate(0.01, safeguards=RateSafeguards(ceiling=0.1))
    _, state = one_step(capped, loss, w)
    np.testing.assert_allclose(state.next_rate, 0.1)
    assert int(state.clipped_rates) == 1


def test_masked_and_partitioned_parameters_move_by_zero_in_the_probe():
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    _, grads, extras = jit(evaluate)(params, *batch)
    only_out = lambda tree: {"hidden": False, "out": True}  # noqa: E731
    masked = optax.masked(optalr.scale_by_learned_rate(0.1), only_out)
    updates, state = jit(masked.update)(grads, masked.init(params), params, **extras)
    out_loss = lambda out: loss_fn({**params, "out": out}, *batch)  # noqa: E731
    _, alone = one_step(optalr.scale_by_learned_rate(0.1), out_loss, params["out"])
    np.testing.assert_allclose(state.inner_state.next_rate, alone.next_rate, rtol=1e-5)

    labels = {"hidden": "a", "out": "b"}
    parted = optax.partition({"a": optax.sgd(0.1), "b": optalr.scale_by_learned_rate(0.1)}, labels)
    both, state = jit(parted.update)(grads, parted.init(params), params, **extras)
    np.testing.assert_allclose(optalr.metrics(state)["next_rate"], alone.next_rate, rtol=1e-5)
    np.testing.assert_allclose(both["out"]["w"], updates["out"]["w"], rtol=1e-6)


@pytest.mark.parametrize("options", MODES)
def test_after_momentum_and_in_multi_steps_in_one_compilation(options):
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    chain = optax.chain(optax.trace(0.9), optalr.scale_by_learned_rate(0.02, **options))
    tx = optax.MultiSteps(chain, 2)
    traces = []

    @jit
    def step(params, state):
        traces.append(1)
        value, grads, extras = evaluate(params, *batch, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(30):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < 0.8 * losses[0]
    assert float(optalr.metrics(state)["learning_rate"]) != pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("options", MODES)
def test_state_keeps_shapes_and_types_and_low_precision_updates_their_dtype(options):
    loss_fn, params, batch = network(dtype=jnp.bfloat16)
    tx = optalr.scale_by_learned_rate(0.05, **options)
    state = tx.init(params)
    _, grads, extras = jit(optalr.value_grad_and_extras(loss_fn))(params, *batch)
    updates, new_state = jit(tx.update)(grads, state, params, **extras)
    kinds = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: (
            (jnp.shape(x), x.dtype, jax.dtypes.is_weakly_typed(x))
            if hasattr(jax.dtypes, "is_weakly_typed")
            else (jnp.shape(x), x.dtype, x.aval.weak_type)
        ),
        tree,
    )
    assert kinds(state) == kinds(new_state)
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    assert new_state.learning_rate.dtype == jnp.float32


@pytest.mark.parametrize("options", [{"order": 2}, {"order": 1}, {"every": 2}])
def test_under_scan_vmap_and_inject_hyperparams(options):
    loss, _, w = quadratic()
    plain = optalr.scale_by_learned_rate(0.01, **options)
    injected = optax.inject_hyperparams(optalr.scale_by_learned_rate)(0.01, **options)
    expected, state = w, None
    for _ in range(4):
        expected, state = one_step(plain, loss, expected, state)

    def body(carry, _):
        return traced_step(injected, loss, *carry), None

    (scanned, _), _ = jax.lax.scan(body, (w, injected.init(w)), length=4)
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-6)

    def run(w):
        state = plain.init(w)
        for _ in range(4):
            w, state = traced_step(plain, loss, w, state)
        return w

    np.testing.assert_allclose(jax.vmap(run)(jnp.stack([w, 2 * w]))[0], expected, rtol=1e-4)


def test_batch_norm_and_dropout_probes_share_the_key_and_write_no_statistics():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(16)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return nn.Dense(3)(x)

    net, (x, y) = Net(), network()[2]
    variables = net.init(jax.random.key(0), x, train=False)
    stats = variables["batch_stats"]

    def loss_fn(params, stats, key, x, y):
        scores, new = net.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean(), new["batch_stats"]

    evaluate = jit(optalr.value_grad_and_extras(loss_fn, has_aux=True))
    tx = optalr.learned_rate_sgd(0.05)
    params, key = variables["params"], jax.random.key(7)
    (_, new_stats), grads, extras = evaluate(params, stats, key, x, y)
    _, state = jit(tx.update)(grads, tx.init(params), params, **extras)

    @jit
    def reference(eta):
        def ray(eta):  # the same key at every rate
            moved = jax.tree.map(lambda w, g: w - eta * g, params, grads)
            return loss_fn(moved, stats, key, x, y)[0]

        once = loss_fn(params, stats, key, x, y)[1]
        return jax.grad(ray)(eta), jax.grad(jax.grad(ray))(eta), once

    slope, curvature, once = reference(0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new_stats, once)
    report = optalr.metrics(state)
    np.testing.assert_allclose(report["ray_slope"], slope, rtol=1e-4)
    np.testing.assert_allclose(report["ray_curvature"], curvature, rtol=1e-3)


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


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"initial_rate": 0.0}, "initial_rate"),
        ({"order": 3}, "order"),
        ({"meta_rate": -1.0}, "meta_rate"),
        ({"rate_momentum": 1.0}, "rate_momentum"),
        ({"every": 0}, "every"),
        ({"derivatives": "approximate"}, "derivatives"),
        ({"derivatives": "successive_gradients"}, "order=1"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        optalr.scale_by_learned_rate(**{"initial_rate": 0.1, **options})


def test_bad_configurations_are_refused_by_name():
    with pytest.raises(TypeError, match="derivatives"):
        optalr.scale_by_learned_rate(0.1, derivatives=lambda f: f)
    with pytest.raises(ValueError, match="step"):
        FiniteDifferences(step=0.0)
    with pytest.raises(ValueError, match="smoothing"):
        optalr.ExactDerivatives(smoothing=-1.0)
    for name, value in (("curvature", 1.0), ("nonfinite", 0.5), ("runaway", -1.0), ("floor", 0.0)):
        with pytest.raises(ValueError, match=name):
            RateSafeguards(**{name: value})
    with pytest.raises(ValueError, match="ceiling"):
        RateSafeguards(floor=1e-3, ceiling=1e-4)


def test_missing_extras_and_losses_without_forward_derivative_say_the_remedy():
    loss, _, w = quadratic()
    tx = optalr.scale_by_learned_rate(0.1)
    with pytest.raises(TypeError, match="value_grad_and_extras"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(TypeError, match="params"):
        tx.update(w, tx.init(w), value_fn=Partial(loss))
    with pytest.raises(ValueError, match="point lacks"):
        tx.update({"w": w}, tx.init({"w": w}), {"v": w}, value_fn=Partial(loss))

    @jax.custom_vjp
    def opaque(x):
        return x**2

    opaque.defvjp(lambda x: (x**2, x), lambda x, c: (2 * x * c,))
    with pytest.raises(TypeError, match="FiniteDifferences"):
        one_step(tx, lambda w: jnp.sum(opaque(w)), w)


def test_unknown_extras_are_ignored_and_untouched_integer_leaves_stay():
    loss, _, w = quadratic()
    tx = optalr.scale_by_learned_rate(0.1)
    a = one_step(tx, loss, w, something_else=3)
    b = one_step(tx, loss, w)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    point = {"w": w, "steps": jnp.int32(3)}
    partial_loss = Partial(lambda p: loss(p["w"]) + 0 * p["steps"])
    grads = {"w": jax.grad(loss)(w), "steps": None}
    _, state = tx.update(
        grads, tx.init({"w": w}), {"w": w, "steps": None}, value_fn=partial_loss, point=point
    )
    np.testing.assert_allclose(state.next_rate, b[1].next_rate, rtol=1e-6)


def test_after_scale_by_kronecker():
    loss_fn, params, batch = network()
    evaluate = optalr.value_grad_and_extras(loss_fn)
    direction = optalr.scale_by_kronecker(damping=1e-2, update_every=5, signals_every=1)
    tx = optax.chain(direction, optalr.scale_by_learned_rate(0.02))

    @jit
    def step(params, state):
        _, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss_fn(params, *batch)
    for _ in range(25):
        params, state = step(params, state)
    assert loss_fn(params, *batch) < 0.5 * start
    assert int(optalr.metrics(state)["failures"]) == 0


def test_the_rate_found_is_handed_to_another_optimizer():
    loss, hessian, w = quadratic()
    tx = optalr.learned_rate_then(
        optax.sgd, 0.01, optalr.switch_at(5), rate_factor=0.5, momentum=0.5
    )
    alone, state_alone, w_alone = optalr.learned_rate_sgd(0.01), None, w
    for _ in range(5):
        w_alone, state_alone = one_step(alone, loss, w_alone, state_alone)
    found = float(optalr.metrics(state_alone)["average_rate"])
    state = None
    for _ in range(8):
        w, state = one_step(tx, loss, w, state)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.5 * found, rtol=1e-5)
    assert 1 / np.linalg.eigvalsh(hessian)[-1] < found < 1 / np.linalg.eigvalsh(hessian)[0]
    with pytest.raises(ValueError, match="rate_factor"):
        optalr.learned_rate_then(optax.sgd, 0.01, optalr.switch_at(5), rate_factor=0.0)
    with pytest.raises(TypeError, match="learning_rate"):
        optalr.learned_rate_then(lambda speed: optax.sgd(speed), 0.01, optalr.switch_at(5))


def test_the_papers_rule_can_be_written_in_a_config():
    tx = optalr.learned_rate_sgd(
        1e-2,
        derivatives={"name": "finite_differences", "step": 1e-5},
        safeguards={"curvature": False, "runaway": False, "nonfinite": False, "floor": 1e-6},
    )
    bare = optalr.learned_rate_sgd(1e-2, derivatives=FiniteDifferences(1e-5), safeguards="off")
    loss, _, w = quadratic()
    jax.tree.map(np.testing.assert_array_equal, one_step(tx, loss, w), one_step(bare, loss, w))
    with pytest.raises(TypeError, match="safeguards"):
        optalr.learned_rate_sgd(1e-2, safeguards="some")
