"""After a fault parameters are finite, the count is there, and training goes on at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.contract import problem
from tests.contract.faults import AFTER, FAULTS, WARM, ZEROS, compiled, run
from tests.contract.registry import METHODS

guarding = pytest.mark.parametrize("method", [m for m in METHODS if m.guards], ids=repr)
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)

# An update is normal again when it has this share of the length it would have had.
NORMAL = 0.3
# Updates after a fault until that is so. Docs and docstrings say "at once".
WITHIN = 2
# No fault makes an update longer than this many times what it would have been.
LONGEST = 10.0


@functools.cache
def healthy(method):
    return run(method, WARM + ZEROS + AFTER)


@guarding
@pytest.mark.parametrize("at", [1, WARM], ids=["early", "late"])
@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_after_a_fault(method, at, name):
    fault, expected = FAULTS[name], healthy(method)
    end = at + fault.steps
    record = run(method, end + AFTER, fault, at)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(record.params))
    if fault.counts:
        assert record.failures[at] > expected.failures[at]
    usual = np.median(expected.norms[expected.norms > 0])
    recovered = record.norms[end:] >= NORMAL * np.minimum(expected.norms[end : end + AFTER], usual)
    assert recovered[:WITHIN].any(), record.norms[end:] / usual
    assert recovered.any()
    assert record.norms.max() <= LONGEST * expected.norms.max()


@every_method
def test_a_scaled_loss_whose_gradient_is_divided_back_changes_nothing(method):
    tx, step = compiled(method)
    scale = np.float32(2.0**15)  # a power of two, so that nothing is rounded
    updates = {}
    for size in (np.float32(1), scale):
        params = problem.make_params()
        state, updates[size] = tx.init(params), []
        for t in range(6):
            batch = problem.make_batch(seed=t)
            # The same parameters at every step, so that differences do not grow along the way.
            _, state, (update, _, _) = step(params, state, batch, np.array([size, 1 / size]))
            updates[size].append(update)
    for plain, scaled in zip(updates[1], updates[scale], strict=True):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-3 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_clipping_before_the_method_does_not_depend_on_the_size_of_the_loss(scale):
    evaluate = optalr.value_grad_and_extras(
        lambda p, x, y: scale * problem.output_loss(problem.predict(p, x, y), x, y)
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optalr.tso_alra(1e-2))
    params, batch = problem.make_params(), problem.make_batch()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        updates, state = tx.update(grads, state, params, **extras)
        return optax.apply_updates(params, updates), state, value / scale

    for _ in range(150):
        params, state, loss = step(params, state)
    assert float(loss) < 0.05


def test_an_outlying_batch_is_forgotten_within_two_refresh_intervals():
    """A batch with ten thousand times the usual loss, on a step that measures."""
    method = next(m for m in METHODS if m.name == "scale_by_kronecker")
    expected = healthy(method)
    record = run(method, WARM + 1 + AFTER, FAULTS["loss_1e4"], WARM)
    assert record.failures[-1] > 0
    ratios = record.norms[WARM + 1 :] / expected.norms[WARM + 1 : WARM + 1 + AFTER]
    assert ratios.min() > 0.2
    assert ratios[6:].min() > 0.5  # update_every is 3
