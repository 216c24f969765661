import jax
import jax.numpy as jnp
import optax
import pytest

import optalr

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}


def after_steps(tx, steps=1):
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(PARAMS, state, PARAMS)
    return state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), optax.chain(tx)),
        lambda tx: optax.partition({"a": tx, "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optalr.two_stage(tx, optax.sgd(0.1), optalr.switch_at(9)),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.inject_hyperparams(optax.adam)(0.25),
        lambda: optax.chain(optax.trace(0.9), optalr.scale_by_recorded_rate(0.25)),
    ],
)
def test_the_learning_rate_is_found_at_any_nesting(wrap, make):
    report = optalr.metrics(after_steps(wrap(make())))
    assert float(report["learning_rate"]) == 0.25
    assert int(report["step"]) == 1
    assert all(jnp.ndim(value) == 0 for value in report.values())


def test_the_rate_is_that_of_the_stage_in_charge():
    tx = optalr.two_stage(
        optalr.scale_by_recorded_rate(1.0),
        optalr.scale_by_recorded_rate(3.0),
        lambda step: step / 2,
    )
    rates = []
    for steps in (1, 2, 3):
        report = jax.jit(optalr.metrics)(after_steps(tx, steps))
        rates.append(float(report["learning_rate"]))
        assert float(report["first/learning_rate"]) == 1.0
        assert float(report["second/learning_rate"]) == 3.0
        assert float(report["phase"]) == (steps - 1) / 2
        assert int(report["steps_since_switch"]) == steps - 1
    assert rates == [1.0, 2.0, 3.0]


def test_a_rate_that_no_state_holds_is_not_invented():
    tx = optalr.two_stage(optalr.scale_by_recorded_rate(1.0), optax.sgd(0.1), optalr.switch_at(1))
    assert float(optalr.metrics(after_steps(tx, 1))["learning_rate"]) == 1.0
    assert float(optalr.metrics(after_steps(tx, 2))["learning_rate"]) == 0.0
    assert "learning_rate" not in optalr.metrics(after_steps(optax.sgd(0.1)))


def test_a_partition_reports_each_group():
    tx = optax.partition(
        {"a": optalr.scale_by_recorded_rate(1.0), "b": optalr.scale_by_recorded_rate(2.0)},
        {"w": "a", "b": "b"},
    )
    report = optalr.metrics(after_steps(tx))
    assert float(report["a/learning_rate"]) == 1.0
    assert float(report["b/learning_rate"]) == 2.0


def test_failures_add_up():
    tx = optax.apply_if_finite(optax.adam(0.1), 10)
    state = tx.init(PARAMS)
    _, state = tx.update(jax.tree.map(lambda x: x * jnp.nan, PARAMS), state, PARAMS)
    assert int(optalr.metrics(state)["failures"]) == 1


def test_bytes_count_every_array_and_random_keys():
    tree = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2), jnp.bfloat16), "key": jax.random.key(0)}
    assert optalr.state_bytes(tree) == 12 + 8 + 8


def test_a_parameter_may_bear_a_reported_name():
    tx = optax.adam(0.1)
    assert "learning_rate" not in optalr.metrics(tx.init({"learning_rate": jnp.ones(2)}))


def test_recorded_rate_keeps_half_precision_and_refuses_negative_rates():
    tx = optalr.scale_by_recorded_rate(0.5)
    grads = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((), jnp.float16)}
    updates, state = tx.update(grads, tx.init(grads))
    assert updates["w"].dtype == jnp.bfloat16
    assert updates["b"].dtype == jnp.float16
    assert state.learning_rate.dtype == jnp.float32
    with pytest.raises(ValueError, match="learning_rate"):
        optalr.scale_by_recorded_rate(-0.1)
