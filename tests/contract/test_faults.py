"""After a fault parameters are finite, the count is there, and training goes on at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from tests.contract import problem
from tests.contract.faults import AFTER, FAULTS, NOW_AND_THEN, WARM, Fault, compiled, run
from tests.contract.lines import Method
from tests.contract.registry import METHODS

guarding = pytest.mark.parametrize("method", [m for m in METHODS if m.guards], ids=repr)

# An update is normal again when it has this share of the length it would have had.
NORMAL = 0.3
# Updates after a fault until that is so. Docs and docstrings say "at once".
WITHIN = 2
# No fault makes an update longer than this many times what it would have been.
TOO_LONG = 10.0


@functools.cache
def healthy(method):
    return run(method, WARM + NOW_AND_THEN + AFTER)


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
    assert record.norms.max() <= TOO_LONG * expected.norms.max()


# A rate of order 2 without a bound on its steps diverges on batches as small as these without any
# fault (``RateSafeguards.max_step`` says so). It is tried with the bound.
UNBOUNDED = {"scale_by_learned_rate", "learned_rate_then", "pass_extras"}
BOUNDED = {"max_step": 1.0, "max_rise": 0.0}
STEADY = [
    *(m for m in METHODS if m.guards and m.name not in UNBOUNDED),
    Method("learned_rate_bounded", lambda: optalr.learned_rate_sgd(0.1, safeguards=BOUNDED)),
]


@pytest.mark.parametrize("method", STEADY, ids=repr)
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_faults_now_and_then_are_all_counted_and_never_believed(method, size):
    fault = Fault(gradient=size, steps=NOW_AND_THEN, every=5)
    end = WARM + fault.steps
    record, expected = run(method, end + AFTER, fault, WARM), healthy(method)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(record.params))
    num_faults = len(range(0, fault.steps, fault.every))
    assert record.failures[-1] - record.failures[WARM - 1] >= num_faults
    assert record.norms.max() <= TOO_LONG * expected.norms.max()


@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if "rescaling" not in [exemption.clause for exemption in m.exempt]],
    ids=repr,
)
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: optalr.tso_alra(1e-2),
        lambda: optalr.tso_alra(1e-2, options={"spectrum": "exact"}),
        lambda: optalr.tso_alra(1e-2, options={"spectrum": "measured"}),
        lambda: optalr.tso_alra(1e-2, statistics="gradient"),
        lambda: optalr.untuned(1000),
        lambda: optalr.untuned(1000, options={"spectrum": "measured"}),
        lambda: optalr.untuned(1000, statistics="gradient"),
        lambda: optalr.tso_alra(1e-2, options={"warmup": 0, "min_batches": 1}),
    ],
    ids=[
        *("factored", "exact", "measured", "gradient"),
        *("untuned", "untuned_measured", "untuned_gradient", "early_roots"),
    ],
)
def test_an_outlier_in_the_very_first_batch_does_not_own_the_factors(make):
    plain, spoiled = (
        run(Method("first", make), 200, fault) for fault in (None, FAULTS["loss_1e4"])
    )
    assert spoiled.norms[100:].mean() > 0.5 * plain.norms[100:].mean()


def test_an_outlying_batch_is_forgotten_within_two_refresh_intervals():
    """A batch with ten thousand times the usual loss, on a step that measures."""
    method = next(m for m in METHODS if m.name == "scale_by_kronecker")
    expected = healthy(method)
    record = run(method, WARM + 1 + AFTER, FAULTS["loss_1e4"], WARM)
    assert record.failures[-1] > 0
    ratios = record.norms[WARM + 1 :] / expected.norms[WARM + 1 : WARM + 1 + AFTER]
    assert ratios.min() > 0.2
    assert ratios[6:].min() > 0.5  # update_every is 3
