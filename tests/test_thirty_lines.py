"""The page "TSO-ALRA in thirty lines" runs, and its plain code is what the library does."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "thirty_lines.md"
BY_HAND, WITH_OPTALR = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
RATE, SWITCH_AT = 0.05, 4
# Nothing but A^p G B^p acts with these.
BARE = {
    "update_every": 1,
    "signals_every": 1,
    "options": {"warmup": 0, "min_batches": 1, "max_update": None},
}
# The library keeps the rate, the damping and the averages' weight in float32 whatever the dtype,
# so that in float64 the two differ by some of its roundings (6e-8 each, twice that at power −1).
FEW_ROUNDINGS = 1e-6


@pytest.fixture(autouse=True, scope="module")
def _broadcasting_as_users_know_it():
    """The page's code broadcasts as plain NumPy code does; the suite's setting forbids that."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def page():
    """The names that the page's two programs leave behind, run one after the other."""
    names = {}
    exec(compile(BY_HAND, "by hand", "exec"), names)
    names["loss_by_hand"] = names["loss"]
    exec(compile(WITH_OPTALR, "with optalr", "exec"), names)
    return names


def relative_errors(actual, expected):
    return [
        float(jnp.linalg.norm(a - e) / jnp.linalg.norm(e))
        for a, e in zip(actual, expected, strict=True)
    ]


def by_hand(page, **settings):
    """Return the page's ``step`` with other settings, as a function of time, weights and memory."""
    names = {**page, **settings}
    exec(compile(BY_HAND[: BY_HAND.index("keys = ")], "by hand", "exec"), names)
    names.update(settings)
    return names["step"]


def test_the_code_by_hand_is_thirty_lines():
    lines = [line for line in BY_HAND.splitlines() if line.strip()]
    method = lines[: next(i for i, line in enumerate(lines) if line.startswith("keys"))]
    assert len(method) <= 30


def test_both_programs_end_at_the_same_weights(page):
    assert max(relative_errors(page["optalr_weights"], page["weights"])) < 1e-4
    np.testing.assert_allclose(page["loss"], page["loss_by_hand"], rtol=1e-4)


def test_the_losses_are_those_that_the_page_states(page):
    text = PAGE.read_text()
    assert f"prints a loss of {float(page['loss_by_hand']):.3f}" in text
    weights, x, y = page["start"], page["x"], page["y"]
    descend = jax.jit(jax.value_and_grad(page["loss_fn"]))
    for _ in range(100):
        loss, grads = descend(weights, x, y)
        weights = [w - page["rate"] * g for w, g in zip(weights, grads, strict=True)]
    assert f"SGD end at a loss of {float(loss):.3f}" in text


def test_each_update_is_the_same(page):
    check_each_update(page, two_stages(), page["start"], tolerance=1e-4)


def test_each_update_is_the_same_in_double_precision(page, x64):
    check_each_update(page, two_stages(), in_double(page["start"]), tolerance=FEW_ROUNDINGS)


def test_another_power_in_double_precision(page, x64):
    # The inverse amplifies the rounding of a softmax's zero eigenvalue too much for float32.
    tx = optax.chain(optalr.scale_by_kronecker(-1.0, **BARE), optax.scale(-RATE))
    check_each_update(page, tx, in_double(page["start"]), tolerance=FEW_ROUNDINGS, power=-1.0)


def two_stages():
    return optalr.tso_alra(RATE, switch_at=SWITCH_AT, momentum=None, **BARE)


def in_double(arrays):
    return [jnp.asarray(np.asarray(array), jnp.float64) for array in arrays]


def check_each_update(page, tx, weights, tolerance, power=-0.5):
    """Compare the updates of both at the weights that the code by hand comes to."""
    num_steps = SWITCH_AT + 2 if power == -0.5 else SWITCH_AT
    x, y = (jnp.asarray(np.asarray(page[name]), weights[0].dtype) for name in ("x", "y"))
    step = by_hand(page, power=power, rate=RATE, switch_at=SWITCH_AT)
    evaluate = optalr.value_grad_and_extras(page["loss_fn"])

    @jax.jit
    def update(weights, state):
        _, grads, extras = evaluate(weights, x, y)
        updates, state = tx.update(grads, state, weights, **extras)
        return updates, grads, state

    state, averages = tx.init(weights), [(0.0, 0.0), (0.0, 0.0)]
    for t in range(num_steps):
        _, new_weights, averages = step(t, weights, averages, x, y)
        expected = [new - old for new, old in zip(new_weights, weights, strict=True)]
        updates, grads, state = update(weights, state)
        assert max(relative_errors(updates, expected)) < tolerance
        plain_sgd = optax.tree.scale(-RATE, grads)
        preconditioned = t < SWITCH_AT
        assert (min(relative_errors(updates, plain_sgd)) > 0.1) == preconditioned
        weights = new_weights
