import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr

NAN = float("nan")


def phases_of(schedule, measurements):
    """Phases after each measurement."""
    state, seen = schedule.init(), []
    for value in measurements:
        state = schedule.update(state, validation_value=jnp.float32(value))
        seen.append(int(schedule(state)))
    return seen


def reference_plateau(values, patience, rtol, atol, cooldown):
    """Phases after each measurement, in plain Python."""
    best, bad, count, switched, seen = np.inf, 0, 0, False, []
    for value in values:
        if not np.isnan(value):
            threshold = best if np.isinf(best) else best - (rtol * abs(best) + atol)
            if value < threshold:
                best, bad = value, 0
            elif count >= cooldown:
                bad += 1
            count += 1
            switched = switched or bad >= patience
        seen.append(int(switched))
    return seen


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3, 2, 1, 1, 1], [0, 0, 0, 0, 1]),
        ([3, NAN, NAN, 3, NAN, 3], [0, 0, 0, 0, 0, 1]),  # patience counts measurements
        ([-1, -2, -3, -3, -3], [0, 0, 0, 0, 1]),  # losses may be negative
        ([-1, -0.5, -2, -1, -1], [0, 0, 0, 0, 1]),
        ([1, -1, 0, 0], [0, 0, 0, 1]),
        ([0, 0, 0], [0, 0, 1]),
        ([1, 2, 2, 0.5], [0, 0, 1, 1]),  # for good
        ([np.inf, np.inf, 1, 2, 2], [0, 1, 1, 1, 1]),
        ([NAN] * 5, [0] * 5),
    ],
)
def test_plateau_by_hand(values, expected):
    assert phases_of(optalr.switch_on_plateau(patience=2), values) == expected


def test_tolerances_say_what_counts_as_progress():
    slow = [10.0, 9.5, 9.0, 8.5, 8.0]
    assert phases_of(optalr.switch_on_plateau(patience=2, rtol=0.0), slow)[-1] == 0
    assert phases_of(optalr.switch_on_plateau(patience=2, rtol=0.0, atol=3.0), slow)[-1] == 1
    assert phases_of(optalr.switch_on_plateau(patience=2, rtol=0.3), slow)[-1] == 1
    negative = [-value for value in reversed(slow)]  # falls from -8 to -10
    assert phases_of(optalr.switch_on_plateau(patience=2, rtol=0.05), negative)[-1] == 0
    assert phases_of(optalr.switch_on_plateau(patience=2, rtol=0.3), negative)[-1] == 1


def test_cooldown_holds_the_first_measurements_against_nothing():
    assert phases_of(optalr.switch_on_plateau(patience=1, cooldown=3), [1, 5, 5, 5]) == [0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_plateau_against_plain_python(seed):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(60) < 0.4, NAN, rng.normal(size=60) - 0.05 * np.arange(60))
    settings = {"patience": 4, "rtol": 0.05, "atol": 0.02, "cooldown": 5}
    expected = reference_plateau(np.float32(values), **settings)
    assert sum(expected) > 0
    assert phases_of(optalr.switch_on_plateau(**settings), values) == expected


def test_plateau_inside_an_optimizer_without_retracing():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(0.5), optalr.switch_on_plateau(patience=1))
    params, traces = jnp.ones(2), []

    @jax.jit
    def step(params, state, value):
        traces.append(1)
        updates, state = tx.update(params, state, params, validation_value=value)
        return updates, state

    state, seen = tx.init(params), []
    for value in (2.0, NAN, 3.0, NAN, 1.0):
        _, state = step(params, state, value)
        seen.append(float(state.hyperparams["phase"]))
    assert seen == [0, 0, 0, 1, 1]  # from the update after the measurement on
    assert len(traces) == 1
    with pytest.raises(
        TypeError, match=r"switch_on_plateau needs the extra.*validation_value=loss"
    ):
        tx.update(params, state, params)


@pytest.mark.parametrize("shape", ["linear", "cosine", lambda x: x**2])
def test_blend_is_exact_at_both_ends_and_rises_between(shape):
    schedule = optalr.blend_between(3, 13, shape=shape)
    state, values = schedule.init(), []
    for _ in range(17):
        values.append(float(schedule(state)))
        state = schedule.update(state)
    assert values[:4] == [0.0] * 4
    assert values[13:] == [1.0] * 4
    assert np.all(np.diff(values[3:14]) > 0)
    assert abs(values[8] - (0.25 if callable(shape) else 0.5)) < 1e-6


def test_blend_weighs_two_whole_updates():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(3.0), optalr.blend_between(0, 4))
    params, rates = jnp.ones(2), []
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(6):
        updates, state = update(params, state, params)
        rates.append(-float(updates[0]))
    assert rates == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_a_stateful_schedule_of_ones_own_reads_extras_and_obeys_set_phase():
    class FollowValue:
        def init(self):
            return jnp.zeros(())

        def update(self, state, *, value, **extra_args):
            return jnp.asarray(value)

        def __call__(self, state, **extra_args):
            return state < 0.5

    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(0.5), FollowValue())
    params = jnp.ones(2)
    state, seen = tx.init(params), []
    for value in (1.0, 0.4, 0.9):
        _, state = tx.update(params, state, params, value=jnp.float32(value))
        seen.append(float(state.hyperparams["phase"]))
    assert seen == [1, 0, 1]
    _, state = tx.update(params, optalr.set_phase(state, 1.0), params, value=jnp.float32(0.9))
    assert float(state.hyperparams["phase"]) == 1


def test_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        optalr.switch_on_plateau(patience=0)
    with pytest.raises(ValueError, match="rtol must lie in"):
        optalr.switch_on_plateau(rtol=-1e-3)
    with pytest.raises(ValueError, match="atol must lie in"):
        optalr.switch_on_plateau(atol=-1.0)
    with pytest.raises(TypeError, match="cooldown must be a whole number"):
        optalr.switch_on_plateau(cooldown=0.5)
    with pytest.raises(ValueError, match="end must come after start=5, got 5"):
        optalr.blend_between(5, 5)
    with pytest.raises(ValueError, match="shape must be one of 'linear', 'cosine'"):
        optalr.blend_between(0, 5, shape="sigmoid")
