import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.experiments.configs.config import ScheduleConfig, from_table
from optalr.experiments.configs.methods import build_method, method_names
from optalr.experiments.configs.rates import build_schedule
from optalr.experiments.errors import ExperimentError


def _method(table, steps_per_epoch=10, total_steps=100, **given):
    return build_method(
        from_table(table), steps_per_epoch=steps_per_epoch, total_steps=total_steps, given=given
    )


def _updates(tx, params, grads, num=3):
    state = tx.init(params)
    for _ in range(num):
        updates, state = tx.update(grads, state, params, value=jnp.float32(1))
        params = optax.apply_updates(params, updates)
    return params, state


PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
GRADS = {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.full(2, 0.25)}


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"name": "sgd"}, optax.sgd(0.1)),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True}, optax.sgd(0.1, 0.9, True)),
        ({"name": "amsgrad", "b1": 0.8}, optax.amsgrad(0.1, b1=0.8)),
        ({"name": "scale_by_adam"}, optax.adam(0.1)),
        ({"name": "adopt"}, optax.contrib.adopt(0.1)),
    ],
)
def test_a_name_and_its_arguments_become_the_optimizer(options, reference):
    tx = _method({"method": {"learning_rate": 0.1, **options}})
    found, state = _updates(tx, PARAMS, GRADS)
    expected, _ = _updates(optax.with_extra_args_support(reference), PARAMS, GRADS)
    # The injected rate is a float32 argument, not a constant: the last bit may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.1, rtol=1e-6)


def test_a_direction_may_be_given_another_length_than_a_rate():
    length = {"name": "scale_by_learned_rate", "initial_rate": 0.5, "lag": False}
    method = {"name": "scale_by_krylov_flow", "damping": [0.0, 1.0], "length": length}
    evaluate = optalr.value_grad_and_extras(lambda w: 0.5 * w[0] ** 2 + 2 * w[1] ** 2)
    tx = _method({"method": {**method, "curvature": "hessian"}})
    w = jnp.ones(2)
    _, grads, extras = evaluate(w)
    updates, state = tx.update(grads, tx.init(w), w, **extras)
    # The search ends where the new gradient is orthogonal to the step.
    np.testing.assert_allclose(jnp.vdot(evaluate(w + updates)[1], updates), 0.0, atol=1e-5)
    # g = (1, 4), Ag = (1, 16): the flow's own length is gᵀAg/‖Ag‖², the search's gᵀg/gᵀAg.
    rate = optalr.metrics(state)["learning_rate"]
    np.testing.assert_allclose(rate, (17 / 65) / (65 / 257), rtol=1e-5)


def test_a_name_with_a_dot_is_a_paper_to_the_letter():
    tx = _method({"method": {"name": "paper.amsgrad", "learning_rate": 0.1, "b1": 0.5}})
    found, state = _updates(tx, PARAMS, GRADS)
    expected, _ = _updates(optalr.paper.amsgrad(0.1, b1=0.5), PARAMS, GRADS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.1, rtol=1e-6)
    assert {f"paper.{name}" for name in optalr.paper.__all__} <= set(method_names())


def test_gains_are_a_section_of_classical():
    tx = _method({"method": {"name": "classical", "rule": "sgd", "gains": {"beta": 0.5}}})
    found, _ = _updates(tx, PARAMS, GRADS, num=2)
    np.testing.assert_allclose(found["bias"], 1.0 - 0.01 * 0.25 * (1 + 1.5), rtol=1e-6)


SWITCH = {"name": "switch_at", "step_epochs": 0.2}  # two of ten steps


def test_a_second_optimizer_follows_one_without_phases():
    second = {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9}
    method = {"name": "adam", "learning_rate": 0.1}
    tx = _method({"method": method, "phase": {**SWITCH, "second": second}})
    found, state = _updates(tx, PARAMS, GRADS, num=4)
    # Adam's steps are 0.1 each where the gradient is constant; then 0.5 g and 0.5 (1.9 g).
    np.testing.assert_allclose(found["bias"], 1.0 - 0.2 - 0.5 * 0.25 * 2.9, rtol=1e-4)
    report = optalr.metrics(state)
    assert float(report["phase"]) == 1.0
    np.testing.assert_allclose(report["learning_rate"], 0.5, rtol=1e-6)


def test_the_learned_rate_is_handed_to_what_phase_second_names():
    second = {"name": "sgd", "momentum": 0.9}
    method = {"name": "learned_rate_then", "initial_rate": 0.1, "rate_factor": 0.1}
    tx = _method({"method": method, "phase": {**SWITCH, "second": second}})
    evaluate, w = optalr.value_grad_and_extras(lambda w: jnp.sum((w - 1) ** 2)), jnp.zeros(3)
    state = tx.init(w)
    for _ in range(4):
        _, grads, extras = evaluate(w)
        updates, state = tx.update(grads, state, w, **extras)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.1 * 0.5, rtol=1e-5)


def test_weight_decay_is_an_l2_penalty_on_kernels():
    tx = _method({"method": {"learning_rate": 1.0}, "train": {"weight_decay": 0.1}})
    found, _ = _updates(tx, PARAMS, GRADS, num=1)
    np.testing.assert_allclose(found["kernel"], 1.0 - (0.5 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(found["bias"], 1.0 - 0.25, rtol=1e-6)


def test_the_gradient_is_clipped():
    tx = _method({"method": {"learning_rate": 1.0}, "train": {"clip_norm": 1e-3}})
    found, _ = _updates(tx, PARAMS, GRADS, num=1)
    moved = jax.tree.map(lambda a, b: a - b, found, PARAMS)
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)


def test_every_name_listed_can_be_found():
    names = method_names()
    assert {"adam", "sgd", "lion", "lbfgs", "amsgrad"} <= set(names)
    assert "inject_hyperparams" not in names


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({"method": {"name": "adma"}}, "method.name 'adma': did you mean 'ada"),
        ({"method": {"name": "chain"}}, "unknown method.name"),
        ({"method": {"name": "adam", "b1": "big"}}, r"method\.b1 must be a number, got 'big'"),
        ({"method": {"name": "tso_alra", "damping": [1]}}, r"method\.damping must be a number"),
        ({"method": {"name": "lion", "b2": True}}, r"method\.b2 must be a number, got True"),
        (
            {
                "phase": {
                    "name": "switch_at",
                    "step": 3,
                    "second": {"name": "adam", "learning_rate": 0.1, "eps": "x"},
                }
            },
            r"phase\.second\.eps must be a number",
        ),
        ({"method": {"name": "adam", "beta1": 0.9}}, r"unknown key 'method.beta1' for adam: .*b1"),
        ({"method": {"name": "sgd", "length": {"name": "sgd"}}}, "unknown key 'method.length'"),
        ({"method": {"name": "scale_by_adam", "length": 0.1}}, "method.length must be a section"),
        (
            {"method": {"name": "scale_by_adam", "length": {"name": "scale_by_learned_rate"}}},
            "needs 'method.length.initial_rate'",
        ),
        ({"method": {"name": "sgd", "momentum_epochs": -1}}, "number of epochs"),
        ({"schedule": {"name": "cosinus"}}, "did you mean 'cosine'"),
        ({"schedule": {"name": "cosine", "final": 0.1}}, r"schedule\.final_factor"),
        ({"schedule": {"name": "steps"}}, r"needs 'schedule\.at_epochs'"),
        ({"schedule": {"name": "steps", "at_epochs": 3}}, "must be a list"),
        ({"schedule": {"name": "constant", "factor": 3}}, "it takes none"),
        ({"phase": {"name": "switch_at", "step": 3}}, r"has no phases.*phase\.second"),
        ({"phase": {**SWITCH, "second": 3}}, "phase.second must be a section that names"),
        ({"phase": {**SWITCH, "second": {"name": "sdg"}}}, "did you mean 'sgd'"),
        (
            {"phase": {**SWITCH, "second": {"name": "sgd", "rate": 1}}},
            r"unknown key 'phase\.second\.rate'",
        ),
        (
            {"method": {"name": "learned_rate_then", "initial_rate": 0.1}, "phase": SWITCH},
            "phase.second must be a section",
        ),
        ({"method": {"name": "paper.amsgard"}}, "did you mean 'paper.amsgrad'"),
        ({"phase": {"name": "switch"}}, "did you mean 'switch_at'"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(table, wanted):
    with pytest.raises(ExperimentError, match=wanted):
        _method(table)


def _rates(name, learning_rate=1.0, **options):
    schedule = build_schedule(
        ScheduleConfig(name=name, **options), learning_rate, steps_per_epoch=10, total_steps=100
    )
    return [float(schedule(jnp.int32(step))) for step in (0, 10, 49, 50, 100)]


def test_schedules():
    np.testing.assert_allclose(_rates("constant"), 1.0)
    cosine = 0.5 * (1 + np.cos(np.pi * np.array([0, 0.1, 0.49, 0.5, 1.0])))
    np.testing.assert_allclose(_rates("cosine"), cosine, atol=1e-6)
    expected = [1, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(_rates("steps", at_epochs=[1, 5]), expected, rtol=1e-6)
    halves = [1, 0.5, 0.5**4.9, 0.5**5, 0.5**10]
    np.testing.assert_allclose(_rates("exponential", decay_per_epoch=0.5), halves, rtol=1e-5)
    inverse = 1 / (1 + 0.5 * np.array([0, 1, 4.9, 5, 10]))
    np.testing.assert_allclose(_rates("inverse", rate_per_epoch=0.5), inverse, rtol=1e-5)
    halved = [1, 1, 0.25, 0.25, 0.5**5]
    np.testing.assert_allclose(_rates("halving", every_epochs=2), halved, rtol=1e-6)
    wave = _rates("triangular", half_cycle_epochs=2, lowest_factor=0.2)
    np.testing.assert_allclose(wave, [0.2, 0.6, 0.2 + 0.8 * 0.9 / 2, 0.6, 1], rtol=1e-4)
    warm = _rates("warmup_cosine", warmup_epochs=2)
    np.testing.assert_allclose(warm[:2], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(warm[-1], 0, atol=1e-6)


def test_a_rate_may_be_traced_for_a_sweep():
    config = from_table({"method": {"name": "adam"}, "schedule": {"name": "cosine"}})

    def first_step(rate):
        tx = build_method(config, steps_per_epoch=10, total_steps=100, learning_rate=rate)
        return _updates(tx, PARAMS, GRADS, num=1)[0]["bias"]

    found = jax.vmap(first_step)(jnp.array([0.1, 0.01]))
    np.testing.assert_allclose(found[:, 0], [0.9, 0.99], rtol=1e-5)
