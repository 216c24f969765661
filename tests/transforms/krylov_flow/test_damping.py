"""The flow's damping: powers of the gradient's norm, and the Levenberg-Marquardt rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr import LevenbergMarquardt, scale_by_krylov_flow
from tests.contract import problem
from tests.transforms.compiling import quick_jit
from tests.transforms.krylov_flow.problems import rosenbrock, squared


def test_levenberg_marquardt_grows_where_the_model_fails_and_shrinks_where_it_is_exact():
    rule = LevenbergMarquardt(initial=1.0)
    quadratic = optalr.composite_loss(lambda w: 2 * w, squared)
    w = jnp.array([0.7, -0.3])
    value, grads, extras = optalr.value_grad_and_extras(quadratic)(w)
    tx = scale_by_krylov_flow(num_steps=2, damping=rule)
    for value_fn, factor in (
        (extras["value_fn"], rule.shrink),
        (lambda _: value + 1.0, rule.grow),
        (lambda _: value * jnp.nan, rule.grow),
        (lambda _: 0.5 * value, 1.0),  # about half of what was predicted
    ):
        _, state = tx.update(grads, tx.init(w), w, **(extras | {"value_fn": value_fn}))
        np.testing.assert_allclose(state.next_damping, factor, rtol=1e-6)
        _, state = tx.update(grads, state, w, **extras)
        np.testing.assert_allclose(state.damping, factor, rtol=1e-6)
    # On a quadratic the undamped model is the loss itself: the ratio is one at any step size.
    for k, step in ((1, 0.5), (2, 1.0)):
        tx = scale_by_krylov_flow(num_steps=k, damping=rule._replace(step_size=step))
        np.testing.assert_allclose(
            tx.update(grads, tx.init(w), w, **extras)[1].reduction_ratio, 1.0, rtol=1e-4
        )


def test_rejected_steps_never_raise_the_loss():
    evaluate = optalr.value_grad_and_extras(optalr.composite_loss(rosenbrock, squared))

    def losses(reject):
        rule = LevenbergMarquardt(initial=1e-8, reject=reject)
        tx = optalr.edf(1.0, num_steps=2, damping=rule)

        @quick_jit
        def step(w, state):
            value, grads, extras = evaluate(w)
            updates, state = tx.update(grads, state, w, **extras)
            return optax.apply_updates(w, updates), state, value

        w, values = jnp.array([-1.2, 1.0]), []
        state = tx.init(w)
        for _ in range(120):
            w, state, value = step(w, state)
            values.append(float(value))
        return np.array(values), state[0]

    values, state = losses(reject=False)
    assert int(state.rejections) == 0
    assert np.max(np.diff(values)) > 100
    values, state = losses(reject=True)
    # Two programs may round the same loss differently.
    assert np.all(np.diff(values) <= 4 * np.finfo(np.float32).eps * values[:-1])
    assert int(state.rejections) > 0
    assert int(state.failures) == 0
    assert values[-1] < 1e-2 * values[0]


@pytest.mark.parametrize("after", [jnp.inf, jnp.nan, 1e6])
def test_a_rejected_step_is_zero_counted_and_damped_more(after):
    loss = optalr.composite_loss(lambda w: 2 * w, squared)
    w = jnp.array([0.7, -0.3])
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    rule = LevenbergMarquardt(reject=True)
    tx = scale_by_krylov_flow(num_steps=2, damping=rule)
    bad = extras | {"value_fn": lambda _: jnp.float32(after)}
    direction, state = tx.update(grads, tx.init(w), w, **bad)
    assert not np.any(direction)
    assert int(state.rejections) == 1
    np.testing.assert_allclose(state.next_damping, rule.grow, rtol=1e-6)
    direction, state = tx.update(grads, state, w, **extras)
    assert float(jnp.vdot(direction, grads)) > 0
    assert int(state.rejections) == 1


def test_recipe_judges_the_step_of_a_constant_rate():
    loss = optalr.composite_loss(rosenbrock, squared)
    w = jnp.array([-1.2, 1.0])
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)

    def ratio(tx):
        return float(
            optalr.metrics(tx.update(grads, tx.init(w), w, **extras)[1])["reduction_ratio"]
        )

    def flow(step):
        rule = LevenbergMarquardt(step_size=step)
        return scale_by_krylov_flow(num_steps=2, damping=rule)

    plain = LevenbergMarquardt()
    tenth = ratio(flow(0.1))
    assert abs(tenth - ratio(flow(1.0))) > 0.1
    for edf, expected in (
        (optalr.edf(0.1, num_steps=2, damping=plain), tenth),
        (
            optax.inject_hyperparams(optalr.edf, static_args=("num_steps",))(
                0.1, num_steps=2, damping=plain
            ),
            tenth,
        ),
        (optalr.edf(0.1, num_steps=2, damping=plain._replace(step_size=0.5)), ratio(flow(0.5))),
        (optalr.edf(lambda count: 0.1, num_steps=2, damping=plain), ratio(flow(1.0))),
        (optalr.edf(0.0, num_steps=2, damping=plain), ratio(flow(1.0))),
    ):
        np.testing.assert_allclose(ratio(edf), expected, rtol=1e-4)


def test_damping_of_a_huge_gradient_is_its_norm_or_a_counted_failure():
    grads = 1e20 * jnp.array([3.0, -4.0])
    for power, damping, failures in ((1.0, 5e20, 0), (2.0, 0.0, 1)):
        tx = scale_by_krylov_flow(curvature="hessian", damping=(1.0, power))
        state = tx.init(grads)._replace(damping=jnp.float32(0.0))
        _, state = tx.update(grads, state, hessian=lambda v: v)
        np.testing.assert_allclose(state.damping, damping, rtol=1e-6)
        assert int(state.failures) == failures


def test_rule_has_the_range_of_float64_parameters():
    # Slopes of 1e-60 vanish in float32, and a slope of zero leaves λ as it is.
    with jax.enable_x64(True):
        loss = optalr.composite_loss(lambda w: 2 * w, squared)
        w = 1e-30 * jnp.array([0.7, -0.3], jnp.float64)
        _, grads, extras = optalr.value_grad_and_extras(loss)(w)
        tx = scale_by_krylov_flow(num_steps=2, damping=LevenbergMarquardt())
        _, state = tx.update(grads, tx.init(w), w, **extras)
        np.testing.assert_allclose(state.next_damping, LevenbergMarquardt().shrink, rtol=1e-6)


def test_only_the_factor_of_the_damping_may_be_a_schedule():
    grads = jnp.array([3.0, -4.0])
    tx = scale_by_krylov_flow(curvature="hessian", damping=(lambda count: 0.5 / (1 + count), 0.0))
    state = tx.init(grads)
    for expected in (0.5, 0.25):
        _, state = tx.update(grads, state, hessian=lambda v: v)
        np.testing.assert_allclose(state.damping, expected, rtol=1e-6)


def test_a_mapping_of_fields_is_a_rule():
    w = jnp.array([-1.2, 1.0])
    loss = optalr.composite_loss(rosenbrock, squared)
    _, grads, extras = optalr.value_grad_and_extras(loss)(w)
    fields = {"initial": 0.5, "reject": False}
    for flow in (scale_by_krylov_flow, lambda **options: optalr.edf(0.1, **options)):
        found, expected = (
            tx.update(grads, tx.init(w), w, **extras)
            for tx in (flow(damping=fields), flow(damping=LevenbergMarquardt(**fields)))
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(TypeError, match="damping has no field 'inital'; its fields are initial,"):
        scale_by_krylov_flow(damping={"inital": 0.5})


@pytest.mark.parametrize("inputs", [0.0, 1.0])
def test_steps_that_fit_one_batch_each_stay_bounded(inputs):
    """Inputs say nothing and labels change, so each step fits one batch alone."""
    params = problem.make_params()
    tx = optalr.edf(
        0.5,
        curvature="hessian",
        num_steps=2,
        damping=optalr.LevenbergMarquardt(),
        acceleration="W2",
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        value, grads, extras = problem.evaluate(params, batch, signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for seed in range(150):
        _, labels = problem.make_batch(seed=seed)
        batch = jnp.full((problem.NUM_EXAMPLES, problem.NUM_INPUTS), inputs), labels
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    assert max(losses) < 10 * losses[0]
    assert int(optalr.metrics(state)["bounded_steps"]) > 0
