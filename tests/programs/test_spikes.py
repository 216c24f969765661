"""A gradient that is too long is shortened once, and its layers' moments with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.programs.problem import loss_fn, make_batch, make_params, traced_step

SPIKES = (15, 16, 31)
METHODS = {
    "tso_alra": optalr.tso_alra(1e-2, switch_at=100, update_every=10, signals_every=1),
    "untuned": optalr.untuned(50, update_every=10),
    "after another rule": optax.chain(
        optax.clip_by_global_norm(1.0), optalr.tso_alra(1e-2, switch_at=100, update_every=10)
    ),
    "twice as large": optax.chain(
        optax.scale(2.0), optalr.tso_alra(1e-2, switch_at=100, update_every=10, signals_every=1)
    ),
}


def spoiling(steps):
    """Return a rule that makes NaN of some updates, as one that divides by zero may."""

    def update(updates, count, params=None, **extras):
        del params, extras
        bad = jnp.isin(count, jnp.array(steps))
        return jax.tree.map(lambda u: jnp.where(bad, jnp.nan, u), updates), count + 1

    start = jnp.zeros((), jnp.int32)
    return optax.GradientTransformationExtraArgs(lambda params: start, update)


def batch_of(step):
    inputs, labels = make_batch(step)
    return (1e3 * inputs if step in SPIKES else inputs), labels


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_told_and_traced_steps_agree_after_spikes(name):
    """The one knows its gradient's factor, the other has to find it out."""
    tx, found = METHODS[name], []
    for step in (optalr.train_step(loss_fn, tx), traced_step(tx)):
        params = make_params()
        state = tx.init(params)
        for i in range(40):
            params, state, _ = step(params, state, *batch_of(i), extras={})
        found.append((params, optalr.metrics(state)))
    (told, report), (traced, _) = found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), told, traced)
    assert report["failures"] > 0 or name == "after another rule"


@pytest.mark.slow
def test_a_rule_inside_a_stage_may_fail():
    """What the switch has admitted is looked at again where a rule has changed it since."""
    inner = optax.chain(
        spoiling([12, 20]), optalr.scale_by_kronecker(update_every=10), optax.scale(-0.01)
    )
    tx = optalr.two_stage(inner, optax.sgd(0.1), optalr.switch_at(100))
    step, params = optalr.train_step(loss_fn, tx), make_params()
    state = tx.init(params)
    for i in range(40):
        params, state, loss = step(params, state, *make_batch(i), extras={})
    assert float(loss) < 1.5
    assert optalr.metrics(state)["failures"] == 2
