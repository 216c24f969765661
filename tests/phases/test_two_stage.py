from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.phases import Released, TwoStageState

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.01, PARAMS)


def injected(first, second, phase):
    return optax.inject_hyperparams(
        optalr.two_stage, static_args=("first", "second"), hyperparam_dtype=jnp.float32
    )(first, second, phase=phase)


def run(tx, state, steps, params=PARAMS):
    history = []
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


def phases(history):
    return [float(state.hyperparams["phase"]) for _, state in history]


class ReaderState(NamedTuple):
    count: jax.Array
    wants_signals: jax.Array


def signal_reader():
    """A transformation that asks for signals in every second update."""

    def init_fn(params):
        return ReaderState(jnp.zeros((), jnp.int32), jnp.ones((), bool))

    def update_fn(updates, state, params=None, **extras):
        count = state.count + 1
        return updates, ReaderState(count, count % 2 == 0)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@pytest.mark.parametrize("build", [optalr.two_stage, injected])
def test_each_stage_does_what_it_does_alone_with_its_own_clock(build):
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    first, second = optax.adam(0.1), optax.sgd(schedule, momentum=0.9)
    tx = build(first, second, optalr.switch_at(3))
    history = run(tx, tx.init(PARAMS), 6)
    assert phases(history) == [0, 0, 0, 1, 1, 1]
    alone = [p for p, _ in run(first, first.init(PARAMS), 3)]
    alone += [p for p, _ in run(second, second.init(PARAMS), 3, alone[-1])]
    for (params, _), expected in zip(history, alone, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), params, expected)
    assert int(history[-1][1].inner_state.steps_since_switch) == 3


def test_a_number_between_blends():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(3.0), 0.25)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -1.5 * g, rtol=1e-6), updates, GRADS)
    assert float(state.phase) == 0.25


def test_a_user_written_schedule():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(2.0), lambda step: (step % 3) / 2)
    assert phases(run(tx, tx.init(PARAMS), 5)) == [0, 0.5, 1, 0, 0.5]
    bare = injected(optax.sgd(1.0), optax.sgd(2.0), lambda step: (step % 3) / 2)
    assert phases(run(bare, bare.init(PARAMS), 5)) == [0, 0.5, 1, 0, 0.5]


def test_three_stages_by_nesting():
    inner = optalr.two_stage(optax.sgd(2.0), optax.sgd(4.0), optalr.switch_at(2))
    tx = optalr.two_stage(optax.sgd(1.0), inner, optalr.switch_at(1))
    history = run(tx, tx.init(PARAMS), 5)
    before = [PARAMS, *[p for p, _ in history[:-1]]]
    rates = [
        float((old["b"] - new["b"])[0] / GRADS["b"][0])
        for old, (new, _) in zip(before, history, strict=True)
    ]
    np.testing.assert_allclose(rates, [1, 2, 2, 4, 4], rtol=1e-4)


def test_the_phase_is_set_by_hand_and_given_back():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(2.0), optalr.switch_at(4))
    state = tx.init(PARAMS)
    by_hand = optalr.set_phase(state, 1.0)
    assert jax.tree.structure(by_hand) == jax.tree.structure(state)
    assert float(by_hand.hyperparams["phase"]) == 1.0
    history = run(tx, by_hand, 2)
    assert phases(history) == [1, 1]
    history = run(tx, optalr.set_phase(history[-1][1], None), 3)
    assert phases(history) == [0, 0, 1]
    assert phases(run(tx, jax.jit(optalr.set_phase)(state, jnp.float32(0.5)), 1)) == [0.5]


def test_set_phase_reaches_any_nesting_and_level():
    inner = optalr.two_stage(optax.sgd(2.0), optax.sgd(4.0), optalr.switch_at(20))
    outer = optalr.two_stage(optax.sgd(1.0), inner, optalr.switch_at(10))
    tx = optax.partition({"a": optax.chain(outer), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"})
    state = optalr.set_phase(optalr.set_phase(tx.init(PARAMS), 1.0), 1.0, level=1)
    updates, state = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -4 * GRADS["w"], rtol=1e-6)
    with pytest.raises(ValueError, match="no phase at level 2"):
        optalr.set_phase(state, 1.0, level=2)


def test_set_phase_refuses_what_it_cannot_do():
    tx = optalr.two_stage(optax.sgd(1.0), optax.sgd(2.0), optalr.switch_at(0))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"phase must lie in \[0, 1\], got 2"):
        optalr.set_phase(state, 2)
    with pytest.raises(ValueError, match="opt_state holds no phase"):
        optalr.set_phase(optax.adam(1.0).init(PARAMS), 1.0)
    bare = injected(optax.sgd(1.0), optax.sgd(2.0), lambda step: 0.0)
    with pytest.raises(TypeError, match="phase_schedule"):
        optalr.set_phase(bare.init(PARAMS), 1.0)
    with pytest.raises(ValueError, match="phase must be 1 once"):
        optalr.set_phase(optalr.release_first_stage(state), 0.0)


def test_a_constant_phase_is_set_by_hand_too():
    tx = injected(optax.sgd(1.0), optax.sgd(2.0), 0.0)
    state = optalr.set_phase(tx.init(PARAMS), 1.0)
    assert phases(run(tx, state, 2)) == [1, 1]


def test_wants_signals_foresees_the_next_update():
    tx = optax.chain(
        optax.clip(1.0), optalr.two_stage(signal_reader(), optax.sgd(1.0), optalr.switch_at(3))
    )
    state, update, wishes = tx.init(PARAMS), jax.jit(tx.update), []
    for _ in range(5):
        wishes.append(bool(jax.jit(optalr.wants_signals)(state)))
        _, state = update(GRADS, state, PARAMS)
    assert wishes == [True, False, True, False, False]
    assert bool(optalr.wants_signals(optalr.set_phase(tx.init(PARAMS), 0.5)))
    assert not bool(optalr.wants_signals(optalr.set_phase(tx.init(PARAMS), 1.0)))
    back = optalr.set_phase(optalr.set_phase(tx.init(PARAMS), 1.0), None)
    assert bool(optalr.wants_signals(back))


def test_wants_signals_through_nested_phases_and_ensembles():
    inner = optalr.two_stage(signal_reader(), optax.sgd(1.0), optalr.switch_at(1))
    tx = optalr.two_stage(optax.sgd(1.0), inner, optalr.switch_at(2))
    state, update, wishes = tx.init(PARAMS), jax.jit(tx.update), []
    for _ in range(4):
        wishes.append(bool(optalr.wants_signals(state)))
        _, state = update(GRADS, state, PARAMS)
    assert wishes == [False, False, True, False]
    many = jax.vmap(inner.init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    assert optalr.wants_signals(many).shape == ()


def test_phase_one_does_none_of_phase_zeros_work():
    calls = []

    def counting(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    first = optax.GradientTransformation(lambda params: optax.EmptyState(), counting)
    tx = optalr.two_stage(first, optax.sgd(1.0), optalr.switch_at(2))
    run(tx, tx.init(PARAMS), 6)
    jax.effects_barrier()
    assert len(calls) == 2


def test_momentum_restarts_or_is_handed_over():
    first, second = optax.sgd(1.0, momentum=0.5), optax.sgd(0.1, momentum=0.5)
    traces = {}
    for choice in ("restart", "hand_over"):
        tx = optalr.two_stage(first, second, optalr.switch_at(2), momentum=choice)
        history = run(tx, tx.init(PARAMS), 4)
        traces[choice] = [state.inner_state.second[0].trace["b"] for _, state in history]
    g = GRADS["b"]
    for choice, factors in (("restart", (0, 0, 1, 1.5)), ("hand_over", (0, 0, 1.75, 1.875))):
        for trace, factor in zip(traces[choice], factors, strict=True):
            np.testing.assert_allclose(trace, factor * g, rtol=1e-6)


def test_momentum_by_a_function_and_from_adam():
    def doubled(first_state, second_state):
        trace = jax.tree.map(lambda x: 2 * x, first_state[0].mu)
        return (second_state[0]._replace(trace=trace), *second_state[1:])

    for choice, factor in (("hand_over", 1), (doubled, 2)):
        tx = optalr.two_stage(
            optax.adam(0.1), optax.sgd(0.1, momentum=0.5), optalr.switch_at(1), momentum=choice
        )
        _, state = run(tx, tx.init(PARAMS), 2)[-1]
        trace = state.inner_state.second[0].trace["b"]
        np.testing.assert_allclose(trace, (1 + 0.5 * 0.1 * factor) * GRADS["b"], rtol=1e-5)


def test_handing_over_needs_momenta():
    tx = optalr.two_stage(
        optax.adam(0.1), optax.sgd(0.1), optalr.switch_at(1), momentum="hand_over"
    )
    with pytest.raises(ValueError, match="the second stage's state has none"):
        tx.init(PARAMS)


def test_arguments_are_refused_at_construction():
    with pytest.raises(TypeError, match=r"second must be an optax\.GradientTransformation"):
        optalr.two_stage(optax.sgd(1.0), 0.1, 0.0)
    with pytest.raises(ValueError, match="phase must lie in"):
        optalr.two_stage(optax.sgd(1.0), optax.sgd(1.0), 1.5)
    with pytest.raises(ValueError, match="momentum must be one of"):
        optalr.two_stage(optax.sgd(1.0), optax.sgd(1.0), 0.0, momentum="keep")
    with pytest.raises(ValueError, match="step must be at least 0"):
        optalr.switch_at(-1)
    with pytest.raises(TypeError, match="step must be a whole number"):
        optalr.switch_at(1.5)
    with pytest.raises(TypeError, match="schedule must be a function"):
        optalr.phase_schedule(0.3)


def test_released_memory_is_gone_and_the_run_goes_on():
    tx = optalr.two_stage(optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optalr.switch_at(1))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="still needed"):
        optalr.release_first_stage(state)
    _, state = run(tx, state, 2)[-1]
    small = optalr.release_first_stage(state)
    assert isinstance(small.inner_state.first, Released)
    assert optalr.state_bytes(small) == optalr.state_bytes(state) - (2 * 24 + 4)
    for (a, _), (b, state_b) in zip(run(tx, state, 3), run(tx, small, 3), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert float(state_b.hyperparams["phase"]) == 1
    with pytest.raises(ValueError, match="no two_stage"):
        optalr.release_first_stage(optax.sgd(0.1).init(PARAMS))


def test_release_wants_nothing_any_more():
    tx = optalr.two_stage(signal_reader(), optax.sgd(1.0), optalr.switch_at(0))
    state = optalr.release_first_stage(tx.init(PARAMS))
    assert optalr.wants_signals(state) == np.False_
    assert isinstance(optalr.wants_signals(state), np.bool_)  # known without running anything


def test_state_keeps_its_types_in_half_precision():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = optalr.two_stage(optax.adam(0.1), optax.sgd(lambda t: 0.1), lambda step: step / 2)
    state = tx.init(params)
    for _ in range(3):
        updates, new_state = tx.update(params, state, params)
        same = jax.tree.map(
            lambda a, b: (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type),
            state,
            new_state,
        )
        assert all(jax.tree.leaves(same)), same
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
        state = new_state
    assert state.hyperparams["phase"].dtype == jnp.float32
    assert isinstance(state.inner_state, TwoStageState)
