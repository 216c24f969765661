"""Every method goes through ``train_step``: the traced step's numbers, and no clock is asked."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import optalr
from tests.contract import problem
from tests.contract.registry import METHODS

LOSS = optalr.composite_loss(problem.predict, problem.output_loss)
# MINRES ends a run of steps that has converged by a condition on data, and the window's matrix is
# decomposed in every update, by a loop over the stack on a CPU. Neither asks a clock.
HAS_LOOPS = {"edf", "edf_hessian", "scale_by_krylov_flow", "scale_by_full_matrix_window"}
CONTROL_FLOW = re.compile(r"stablehlo\.(while|case|if)\b")


def further(seed):
    """Return what a loop adds to the extras of the step."""
    value_fn = Partial(lambda batch, params: LOSS(params, *batch), problem.make_batch(seed=99))
    measured = (jnp.float32(1.0), jnp.bool_(False))
    return {"validation_value": measured, "validation_value_fn": value_fn}


def traced_step(tx):
    evaluate = optalr.value_grad_and_extras(LOSS)

    @jax.jit
    def step(params, state, batch, extras):
        wanted = optalr.wants_signals(state)
        value, grads, found = evaluate(params, *batch, signals=wanted)
        updates, state = tx.update(grads, state, params, **{**found, **extras})
        return optax.apply_updates(params, updates), state, value

    return step


def assert_traced_numbers(method, *, steps, num_examples=problem.NUM_EXAMPLES):
    tx = method.make()
    traced, step = traced_step(tx), optalr.train_step(LOSS, tx, donate=False)
    params = other = problem.make_params()
    state = other_state = tx.init(params)
    for seed in range(steps):
        batch = jax.tree.map(lambda x: x[:num_examples], problem.make_batch(seed=seed))
        params, state, value = traced(params, state, batch, further(seed))
        other, other_state, other_value = step(other, other_state, *batch, extras=further(seed))
        np.testing.assert_allclose(other_value, value, rtol=10 * method.rtol)
    assert jax.tree.structure(other_state) == jax.tree.structure(state)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        assert (one.shape, one.dtype, one.weak_type) == (two.shape, two.dtype, two.weak_type)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_numbers_are_those_of_the_traced_step(method):
    assert_traced_numbers(method, steps=12)


# Gradients of one example are multiplied as the outer products that they are. Steps that ascend
# from it are chaotic soon, so there are few.
@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if "signals" in m.needs], ids=repr)
def test_one_example_has_the_traced_numbers(method):
    assert_traced_numbers(method, steps=7, num_examples=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("kind", ["plain", "measuring", "second"])
def test_programs_hold_no_control_flow(method, kind):
    if method.name in HAS_LOOPS:
        pytest.skip("loops over no clock")
    tx, params = method.make(), problem.make_params()
    step, state = optalr.train_step(LOSS, tx), tx.init(params)
    lowered = step.lower(params, state, *problem.make_batch(), kind=kind, extras=further(0))
    assert not CONTROL_FLOW.findall(lowered.as_text())
