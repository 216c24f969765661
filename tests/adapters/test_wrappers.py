import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optalr
from optalr.adapters import nnx as nnx_adapter
from tests.contract import problem

K = 4
HAS_WIDE_SUMS = "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters
PARAMS = problem.make_params()
# Adam rounds each of its steps to the dtype. Which of them a compiler fuses, and so does not round,
# differs between processors: four units in the last place, of updates of up to 0.1.
ROUNDING = {jnp.float32: 1e-6, jnp.bfloat16: 4 * float(jnp.finfo(jnp.bfloat16).eps)}


def gradients(num, dtype=jnp.float32):
    for i in range(num):
        keys = jax.random.split(jax.random.key(i), len(jax.tree.leaves(PARAMS)))
        keys = jax.tree.unflatten(jax.tree.structure(PARAMS), list(keys))
        yield jax.tree.map(lambda p, k: jax.random.normal(k, p.shape, dtype), PARAMS, keys)


def assert_close(actual, expected, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerances
        ),
        actual,
        expected,
    )


def schedule(gradient_step):
    return jnp.where(gradient_step < 2, 1, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("every", [1, K, schedule], ids=["1", "4", "schedule"])
def test_numbers_are_those_of_optax(every, mean, dtype):
    params = problem.make_params(dtype)
    ours = optalr.multi_steps(optax.adam(0.1), every, use_grad_mean=mean)
    theirs = optax.MultiSteps(optax.adam(0.1), every, use_grad_mean=mean)
    state, reference = ours.init(params), theirs.init(params)
    for grads in gradients(9, dtype):
        updates, state = ours.update(grads, state, params)
        expected, reference = theirs.update(grads, reference, params)
        # Older releases of optax gather in half precision.
        if dtype == jnp.float32 or HAS_WIDE_SUMS:
            assert_close(updates, expected, rtol=ROUNDING[dtype], atol=0.1 * ROUNDING[dtype])
        assert int(state.mini_step) == int(reference.mini_step)
        assert int(state.gradient_step) == int(reference.gradient_step)
        assert bool(theirs.has_updated(state)) == bool(theirs.has_updated(reference))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.acc_grads))


def test_a_gradient_that_is_skipped_never_came():
    ours = optalr.multi_steps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    theirs = optax.MultiSteps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite)
    state, reference = ours.init(PARAMS), theirs.init(PARAMS)
    for i, grads in enumerate(gradients(5)):
        broken = jax.tree.map(lambda g: g * jnp.nan, grads) if i in (1, 2) else grads
        updates, state = ours.update(broken, state, PARAMS)
        expected, reference = theirs.update(broken, reference, PARAMS)
        assert_close(updates, expected, rtol=1e-6)
        assert_close(state[:5], tuple(reference), rtol=1e-6)


@functools.cache
def captures():
    """A step that counts at run time how often moments are measured and how often inner runs."""
    counts = {"measured": 0, "run": 0, "traced": 0}

    def count(name, yes=True):
        counts[name] += int(yes)

    def init(params):
        return optalr.scale_by_kronecker(signals_every=1).init(params)

    def update(updates, state, params=None, **extras):
        jax.debug.callback(lambda: count("run"))
        return optalr.scale_by_kronecker(signals_every=1).update(updates, state, params, **extras)

    inner = optax.GradientTransformationExtraArgs(init, update)
    tx = optalr.multi_steps(optax.chain(inner, optax.scale(-0.1)), K)

    @jax.jit
    def step(params, state):
        counts["traced"] += 1
        wanted = optalr.wants_signals(state)
        _, grads, extras = problem.evaluate(params, problem.make_batch(), signals=wanted)
        measured = extras["signals"]["hidden"]["kernel"].count > 0
        jax.debug.callback(lambda yes: count("measured", yes), measured)
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state

    return tx, step, counts


def test_signals_are_measured_in_the_last_of_k_calls():
    tx, step, counts = captures()
    params, state = PARAMS, tx.init(PARAMS)
    wanted = []
    for _ in range(2 * K):
        wanted.append(bool(optalr.wants_signals(state)))
        params, state = step(params, state)
    jax.effects_barrier()
    assert wanted == 2 * ([False] * (K - 1) + [True])
    assert counts == {"measured": 2, "run": 2, "traced": 1}
    assert int(optalr.metrics(state)["failures"]) == 0


def test_plain_multi_steps_may_emit_in_any_call():
    tx = optax.MultiSteps(optalr.scale_by_kronecker(signals_every=1), K)
    assert bool(optalr.wants_signals(tx.init(PARAMS)))


def test_k_can_be_injected_and_takes_effect_one_call_later():
    tx = optax.inject_hyperparams(lambda k: optalr.multi_steps(optax.sgd(0.1), k))(k=2)
    state, emitted = tx.init(PARAMS), []
    step = jax.jit(tx.update)
    for i, grads in enumerate(gradients(9)):
        if i == 3:
            state.hyperparams["k"] = jnp.full_like(state.hyperparams["k"], 3)
        wanted = bool(state.inner_state.emits)
        updates, state = step(grads, state, PARAMS)
        emitted.append(any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates)))
        assert emitted[-1] == wanted
    assert emitted == [False, True, False, True, False, False, True, False, False]


def test_a_phase_that_is_injected_decides_inside_multi_steps():
    first = optalr.scale_by_kronecker(signals_every=1)
    make = optax.inject_hyperparams(
        lambda phase: optalr.multi_steps(optalr.two_stage(first, optax.sgd(0.1), phase), 2)
    )
    tx = make(phase=0.0)
    state = tx.init(PARAMS)
    wanted = []
    for _ in range(4):
        wanted.append(bool(optalr.wants_signals(state)))
        _, grads, extras = problem.evaluate(PARAMS, problem.make_batch())
        _, state = tx.update(grads, state, PARAMS, **extras)
    assert wanted == [False, True, False, True]
    state.hyperparams["phase"] = jnp.ones_like(state.hyperparams["phase"])
    assert not any(
        bool(optalr.wants_signals(state._replace(inner_state=inner)))
        for inner in (state.inner_state, state.inner_state._replace(emits=jnp.bool_(True)))
    )


def test_scanned_donated_and_in_an_ensemble():
    tx = optalr.multi_steps(optax.adam(0.1), 2)
    grads = list(gradients(4))
    params, state = PARAMS, tx.init(PARAMS)
    for gradient in grads:
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)

    def run(params, state, grads):
        def body(carry, gradient):
            updates, state = tx.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, state), grads)[0]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scanned = jax.jit(run, donate_argnums=1)(PARAMS, tx.init(PARAMS), stacked)
    assert_close(scanned, (params, state), rtol=1e-5, atol=1e-7)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (PARAMS, tx.init(PARAMS)))
    ensemble = jax.vmap(run, in_axes=(0, 0, None))(*twice, stacked)
    assert_close(jax.tree.map(lambda leaf: leaf[1], ensemble), scanned, rtol=1e-5, atol=1e-7)


def test_lookahead_with_extras_takes_the_steps_of_the_method():
    inner = optalr.learned_rate_sgd(0.1)
    tx = optalr.pass_extras(lambda fast: optax.lookahead(fast, 2, 0.5), inner)
    slow = plain = PARAMS
    params = optax.LookaheadParams.init_synced(PARAMS)
    state, plain_state = tx.init(params), inner.init(PARAMS)
    for i in range(4):
        _, grads, extras = problem.evaluate(params.fast, problem.make_batch(), signals=False)
        updates, state = tx.update(grads, state, params, **extras)
        params = optax.apply_updates(params, updates)
        _, grads, extras = problem.evaluate(plain, problem.make_batch(), signals=False)
        updates, plain_state = inner.update(grads, plain_state, plain, **extras)
        plain = optax.apply_updates(plain, updates)
        if i % 2:
            plain = slow = jax.tree.map(lambda a, b: a + 0.5 * (b - a), slow, plain)
    assert_close(params.fast, plain, rtol=1e-4, atol=1e-6)
    assert_close(params.slow, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: optalr.multi_steps(3, 2), "inner"),
        (lambda: optalr.multi_steps(optax.sgd(0.1), 0), "every_k_schedule"),
        (lambda: optalr.multi_steps(optax.sgd(0.1), 1.5), "every_k_schedule"),
        (lambda: optalr.pass_extras(optax.sgd(0.1), optax.sgd(0.1)), "wrap"),
        (lambda: optalr.pass_extras(lambda tx: None, optax.sgd(0.1)), "wrap"),
    ],
)
def test_errors_name_the_argument(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        make()


# Flax's own training states.


def test_a_stock_nnx_optimizer_takes_our_gradients_and_extras():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
    evaluate = nnx_adapter.value_grad_and_extras(lambda model, x, y: jnp.mean((model(x) - y) ** 2))
    optimizer = nnx.Optimizer(model, optalr.learned_rate_sgd(0.1), wrt=nnx.Param)
    value, grads, extras = evaluate(model, x, y)
    optimizer.update(model, grads, **extras)
    assert float(evaluate(model, x, y)[0]) < float(value)
    with pytest.raises(TypeError, match=r"value_fn.*update\(model, grads, \*\*extras\)"):
        optimizer.update(model, grads)


def test_a_stock_linen_state_says_what_to_use():
    params = {"w": jnp.ones((3, 2))}
    tx = optalr.scale_by_kronecker()
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    with pytest.raises(TypeError, match=r"signals.*optalr\.adapters\.linen\.TrainState"):
        state.apply_gradients(grads=params, extras={})
