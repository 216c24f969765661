"""The learned learning rate: its safeguards, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import optalr
from optalr import FiniteDifferences, RateSafeguards
from tests.transforms.learned_rate.problems import one_step, quadratic


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


def test_momentum_of_the_rate_takes_no_step_beyond_newtons():
    """On a quadratic with the best rate 1 the bare rule goes from 0.01 to 1 and on to 1.9."""
    loss = lambda w: 0.5 * jnp.sum(w**2)  # noqa: E731
    for safeguards, peak in (("off", 1.9), ("on", 1.0)):
        tx = optalr.scale_by_learned_rate(0.01, rate_momentum=0.9, safeguards=safeguards)
        w, state, rates = jnp.array([1e3]), None, []
        for _ in range(3):
            w, state = one_step(tx, loss, w, state)
            rates.append(float(state.next_rate))
        assert max(rates) == pytest.approx(peak, abs=0.02)
        assert min(rates) >= 0.5


def test_no_momentum_is_added_to_a_rate_that_a_safeguard_set():
    hill = lambda w: -(w[0] ** 2)  # noqa: E731
    tx = optalr.scale_by_learned_rate(0.25, rate_momentum=0.9)
    w, state = jnp.array([1.0]), None
    for expected in (0.5, 1.0, 2.0):  # doubled, and no more
        w, state = one_step(tx, hill, w, state)
        assert float(state.next_rate) == pytest.approx(expected)


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


def test_the_optional_bound_on_steps_begins_once_the_loss_has_risen():
    loss, _, w = quadratic()
    start = loss(w)
    safeguards = RateSafeguards(max_step=0.01)
    tx = optalr.scale_by_learned_rate(0.01, safeguards=safeguards)
    free = optalr.scale_by_learned_rate(0.01)
    (w1, s1), (w2, s2) = one_step(tx, loss, w), one_step(free, loss, w)
    np.testing.assert_array_equal(w1, w2)  # nothing has risen yet
    far = w + 30 * (w - w1)  # against the gradient, uphill
    assert loss(far) > 1.5 * start
    moved, s1 = one_step(tx, loss, far, s1)
    _, s2 = one_step(free, loss, far, s2)
    np.testing.assert_allclose(jnp.linalg.norm(moved - far), 0.01, rtol=1e-3)
    np.testing.assert_allclose(s1.next_rate, s2.next_rate)  # what is learned stays
    assert float(s1.learning_rate) < float(s2.learning_rate)
    report = optalr.metrics(s1)
    assert int(report["bounded_steps"]) == 1
    assert int(s2.bounded_steps) == 0
    moved, s1 = one_step(tx, loss, w, s1)  # and for good
    assert jnp.linalg.norm(moved - w) < 0.0101


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
    for name, value in (
        ("curvature", 1.0),
        ("nonfinite", 0.5),
        ("runaway", -1.0),
        ("max_drag", -0.1),
        ("max_step", 0.0),
        ("floor", 0.0),
    ):
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
