"""``train_step``: the traced step's numbers, few programs, and a host that is never misled."""

import functools
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr
from tests.programs.problem import copied, loss_fn, make_batch, make_params, traced_step


def no_extras(step):
    del step
    return {}


def run(tx, *, steps, extras=no_extras, state=None, params=None, start=0, step=None, **options):
    """Return the losses of a run by ``train_step``, the step, and what it ends with."""
    step = optalr.train_step(loss_fn, tx, **options) if step is None else step
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    losses = []
    for i in range(start, start + steps):
        params, state, loss = step(params, state, *make_batch(i), extras=extras(i))
        losses.append(float(loss))
    return losses, step, params, state


def traced_losses(tx, *, steps, extras=no_extras):
    step, params = traced_step(tx), make_params()
    state, losses = tx.init(params), []
    for i in range(steps):
        params, state, loss = step(params, state, *make_batch(i), extras=extras(i))
        losses.append(float(loss))
    return losses


@functools.cache
def two_stages():
    recipe = optalr.tso_alra(1e-2, switch_at=60, second_learning_rate=0.1, update_every=20)
    return optax.chain(optax.clip_by_global_norm(1.0), recipe)


@functools.cache
def their_step():
    """Return one step for several tests, so that its programs are compiled once."""
    return optalr.train_step(loss_fn, two_stages())


def test_a_whole_run_has_the_traced_numbers_and_four_programs():
    losses, step, _, state = run(two_stages(), steps=80)
    np.testing.assert_allclose(losses, traced_losses(two_stages(), steps=80), rtol=1e-5)
    assert step.kinds == ["measuring", "refreshing", "plain", "second"]
    assert optalr.metrics(state)["phase"] == 1


def test_a_run_that_is_resumed_goes_on_as_before():
    losses, *_ = run(two_stages(), steps=70, step=their_step())
    first, _, params, state = run(two_stages(), steps=37, step=their_step())
    # As from a checkpoint: the same numbers in other arrays.
    again = {"params": copied(params), "state": copied(state), "start": 37}
    rest, *_ = run(two_stages(), steps=33, step=their_step(), **again)
    assert first + rest == losses


def test_a_broken_batch_sets_the_copy_right():
    step, params = their_step(), make_params()
    state = two_stages().init(params)
    for i in range(59):
        inputs, labels = make_batch(i)
        inputs = inputs * jnp.nan if i in (0, 1, 2, 13) else inputs
        params, state, loss = step(params, state, inputs, labels)
    assert np.isfinite(loss)
    report = optalr.metrics(state)
    assert report["failures"] >= 4
    assert report["root_age"] < 20
    assert report["root_residual"] < 1e-2


CONFIGURED = {"told", "period", "periods", "hands_over", "start", "end"}


def saved_before(state):
    """Return a state as a release without clocks saved it."""
    if not isinstance(state, dict):
        return state
    return {name: saved_before(part) for name, part in state.items() if name not in CONFIGURED}


@pytest.mark.parametrize(
    "tx",
    [
        optalr.two_stage(optax.sgd(0.01), optax.sgd(0.1), optalr.switch_at(5)),
        optax.chain(optalr.scale_by_block_diagonal(update_every=5), optax.scale(-0.01)),
        optalr.multi_steps(optax.sgd(0.1), 3),
    ],
    ids=["switch", "roots", "gathering"],
)
def test_a_state_without_periods_is_read_again(tx):
    saved = saved_before(flax.serialization.to_state_dict(tx.init(make_params())))
    # By its shapes alone: nothing says what the periods are.
    state = optalr.upgrade_state(saved, jax.eval_shape(tx.init, make_params()))
    losses, *_ = run(tx, steps=12, state=state)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=12), rtol=1e-5)


def test_the_host_waits_once_for_a_new_run(monkeypatch):
    reads, fetch = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(x) or fetch(x))
    first, second = optax.sgd(0.01), optalr.tso_alra(1e-2, update_every=20)
    tx = optalr.two_stage(first, second, optalr.switch_at(6))
    run(tx, steps=6)
    # A second stage that has not begun has seen no batch, and nobody waits for one.
    assert len(reads) == 1


def test_two_runs_may_alternate_in_one_step():
    step, one, two = their_step(), make_params(), make_params()
    state_one, state_two = two_stages().init(one), two_stages().init(two)
    for i in range(6):
        one, state_one, loss_one = step(one, state_one, *make_batch(i))
        two, state_two, loss_two = step(two, state_two, *make_batch(i))
        assert float(loss_one) == float(loss_two)


def held_out_loss(batch, params):
    return loss_fn(params, *batch)


def held_out(step):
    del step
    return {"validation_value_fn": Partial(held_out_loss, make_batch(999))}


@pytest.mark.slow
def test_untuned_learns_its_decay():
    tx = optalr.untuned(40, learn_every=3)
    losses, step, _, state = run(tx, steps=40, extras=held_out)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=40, extras=held_out), rtol=1e-5)
    assert int(state[2].probes) > 10
    assert "refreshing" in step.kinds


@pytest.mark.slow
def test_gradients_are_gathered():
    tx = optalr.multi_steps(optalr.tso_alra(1e-2, update_every=4), 3)
    losses, step, *_ = run(tx, steps=40)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=40), rtol=1e-5)
    assert step.kinds[0] == "gathering"


@pytest.mark.slow
def test_a_momentum_is_handed_over_and_phases_are_blended():
    first = optax.chain(optax.trace(0.9), optax.scale(-0.01))
    second = optax.chain(optax.trace(0.9), optax.scale(-0.05))
    for phase in (optalr.switch_at(5), optalr.blend_between(3, 9)):
        tx = optalr.two_stage(first, second, phase, momentum="hand_over")
        losses, *_ = run(tx, steps=15)
        np.testing.assert_allclose(losses, traced_losses(tx, steps=15), rtol=1e-5)


@pytest.mark.parametrize("read_every", [2, 10])
def test_a_plateau_takes_effect_in_time(read_every):
    tx = optalr.two_stage(optax.sgd(0.0), optax.sgd(0.1), optalr.switch_on_plateau(patience=1))

    def extras(step):
        return {"validation_value": (1.0, step in (0, 7))}

    _, step, _, state = run(tx, steps=30, extras=extras, read_every=read_every)
    assert step.kinds == ["plain", "second"]
    # The second measurement, in update 7, is no better than the first.
    assert 30 - 8 - read_every <= int(state.inner_state.steps_since_switch) <= 30 - 8


def test_a_phase_set_by_hand_takes_effect_at_once():
    tx = optalr.two_stage(optax.sgd(0.0), optax.sgd(0.1), optalr.switch_at(1000))
    _, step, params, state = run(tx, steps=5)
    state = optalr.set_phase(state, 1.0)
    _, state, _ = step(params, state, *make_batch(5))
    assert float(state.inner_state.phase) == 1
    assert step.kinds == ["plain", "second"]


def closure(batch):
    return lambda params: loss_fn(params, *batch)


def partial_of_a_new_function(batch):
    return Partial(lambda batch, params: loss_fn(params, *batch), batch)


@pytest.mark.parametrize("make", [closure, partial_of_a_new_function])
def test_a_new_batch_or_closure_is_no_new_program(make):
    traces: list[bool] = []

    def counting(params, inputs, labels, training):
        traces.append(training)
        return loss_fn(params, inputs, labels)

    tx = optalr.add_learned_decay(0.1, every=1)
    step, params = optalr.train_step(counting, optax.chain(tx, optax.scale(-0.1))), make_params()
    state = optax.chain(tx, optax.scale(-0.1)).init(params)
    counts = []
    for i in range(4):
        batch = make_batch(100 + i)
        extras = {"validation_value_fn": make(batch)}
        params, state, _ = step(params, state, *make_batch(i), True, extras=extras)
        counts.append(len(traces))
    assert counts[0] == counts[-1] > 0
    step(params, state, *make_batch(5), False, extras=extras)
    assert not traces[-1]


def test_auxiliary_output_passes_and_arrays_are_given_away():
    def with_aux(params, inputs, labels):
        return loss_fn(params, inputs, labels), {"count": labels.size}

    params, tx = make_params(), optax.adam(1e-2)
    kept = optalr.train_step(with_aux, tx, has_aux=True, donate=False)
    new, _, (loss, aux) = kept(params, tx.init(params), *make_batch(0))
    assert aux["count"] == 64
    assert jnp.isfinite(loss)
    given = optalr.train_step(with_aux, tx, has_aux=True)
    given(params, tx.init(params), *make_batch(0))
    assert jax.tree.leaves(params)[0].is_deleted()
    assert not jax.tree.leaves(new)[0].is_deleted()


def test_wrappers_that_decide_on_the_device_are_asked_there():
    inner = optalr.scale_by_full_matrix(update_every=2, max_size=1000)
    tx = optax.apply_if_finite(optax.chain(inner, optax.scale(-0.1)), 3)
    with pytest.warns(UserWarning, match="ApplyIfFiniteState says on the device"):
        losses, *_ = run(tx, steps=6)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=6), rtol=1e-5)


def test_a_phase_by_a_bare_function_is_asked_on_the_device():
    phase = optalr.phase_schedule(lambda count: count >= 4)
    tx = optalr.two_stage(optax.sgd(0.01), optax.sgd(0.1), phase)
    with pytest.warns(UserWarning, match="bare function"):
        losses, *_ = run(tx, steps=8)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=8), rtol=1e-5)


@pytest.mark.slow
def test_a_period_by_a_schedule_is_asked_on_the_device():
    make = optax.inject_hyperparams(
        optalr.scale_by_block_diagonal, static_args=("damping_form", "max_size", "bias_correction")
    )
    tx = optax.chain(
        make(update_every=lambda count: jnp.where(count < 6, 2, 5)), optax.scale(-0.01)
    )
    with pytest.warns(UserWarning, match="a schedule sets update_every"):
        losses, *_ = run(tx, steps=16)
    np.testing.assert_allclose(losses, traced_losses(tx, steps=16), rtol=1e-5)


def test_nothing_is_told_where_there_is_no_clock():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, step, _, state = run(optax.adam(1e-2), steps=3)
    assert step.kinds == ["plain"]
    assert int(state[0].count) == 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"read_every": 1}, ValueError, "read_every"),
        ({"read_every": 2.5}, TypeError, "read_every"),
        ({"evry": 2}, TypeError, "evry"),
        ({"every": 0}, ValueError, "every"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        optalr.train_step(loss_fn, optax.sgd(0.1), **options)


def test_bad_calls_are_refused():
    params, tx = copied(make_params()), optax.sgd(0.1)
    with pytest.raises(TypeError, match="tx must be"):
        optalr.train_step(loss_fn, 0.1)
    with pytest.raises(TypeError, match="loss_fn"):
        optalr.train_step(None, tx)
    step = optalr.train_step(loss_fn, tx)
    with pytest.raises(TypeError, match="extras must be a dict"):
        step(params, tx.init(params), *make_batch(0), extras=1.0)
    with pytest.raises(TypeError, match="hashable"):
        step(params, tx.init(params), *make_batch(0), {1, 2})
    with pytest.raises(ValueError, match="kind"):
        step.lower(params, tx.init(params), *make_batch(0), kind="third")


def test_signals_pass_through_optax_multi_steps():
    """It is no transformation of the types that take extras, and takes them all the same."""
    tx = optax.MultiSteps(optalr.tso_alra(1e-2, update_every=4), 2)
    with pytest.warns(UserWarning, match="MultiStepsState says on the device alone"):
        losses, *_ = run(tx, steps=6)
    assert np.isfinite(losses).all()
