"""``jax_debug_nans`` finds nothing in a healthy run: no NaN is a mark or computed in vain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.contract import problem
from tests.contract.registry import METHODS


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_healthy_run_has_no_nan(method):
    def step(params, state, batch):
        _, grads, extras = problem.evaluate(params, batch, signals=optalr.wants_signals(state))
        extras["validation_value"] = (jnp.float32(0), jnp.bool_(False))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, optalr.metrics(state)

    with jax.debug_nans(True):
        tx, params = method.make(), problem.make_params()
        state = tx.init(params)
        for leaf in jax.tree.leaves(state):
            assert not np.isnan(np.asarray(leaf, np.float64)).any()
        compiled = jax.jit(step)
        for seed in range(4):
            params, state, report = compiled(params, state, problem.make_batch(seed=seed))
        assert not any(np.isnan(value) for value in report.values())


def test_a_phase_set_by_hand_is_no_nan():
    tx = optalr.two_stage(optax.adam(0.1), optax.sgd(0.5), optalr.switch_on_plateau())
    with jax.debug_nans(True):
        state = tx.init(jnp.ones(2))
        for phase in (1.0, None, 0.0):
            state = optalr.set_phase(state, phase)
            measured = jnp.float32(1.0), jnp.bool_(True)
            _, state = tx.update(jnp.ones(2), state, jnp.ones(2), validation_value=measured)
            assert not any(
                np.isnan(np.asarray(x, np.float64)).any() for x in jax.tree.leaves(state)
            )
