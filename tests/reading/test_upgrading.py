"""States that version 0.1 saved load, and training goes on with the same numbers."""

import pathlib

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr

# Written by 0.1 (at 4ad15c4): a state after three steps, its parameters, and those one step later.
SAVED = pathlib.Path(__file__).parent / "states_of_0_1"
OPTIONS = {
    "factored": {},
    "measured": {"spectrum": "measured", "block_size": 3},
    "warm": {"root_method": "eigenbasis"},
}


def loss_fn(p, x, y):
    h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None]) * p["scale"][None]
    return jnp.mean(jnp.sum((h @ p["c"]["w"] - y) ** 2, -1))


def method(name):
    options = {"warmup": 0, "min_batches": 1, **OPTIONS[name]}
    return optax.chain(
        optax.clip_by_global_norm(10.0), optalr.tso_alra(1e-2, switch_at=9, options=options)
    )


@pytest.fixture(params=OPTIONS)
def old(request):
    saved = flax.serialization.msgpack_restore((SAVED / f"{request.param}.msgpack").read_bytes())
    return method(request.param), saved


def test_training_goes_on_from_a_state_of_0_1(old):
    tx, saved = old
    params = jax.tree.map(jnp.asarray, saved["params"])
    like = jax.eval_shape(tx.init, params)
    state = optalr.upgrade_state(saved["state"], like)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    evaluate = optalr.value_grad_and_extras(loss_fn)
    _, grads, extras = evaluate(params, saved["x"], saved["y"])
    updates, _ = jax.jit(lambda g, s, p, e: tx.update(g, s, p, **e))(grads, state, params, extras)
    after = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, saved["after"])


def test_a_state_of_today_is_accepted(old):
    tx, saved = old
    state = optalr.upgrade_state(saved["state"], tx.init(saved["params"]))
    again = optalr.upgrade_state(flax.serialization.to_state_dict(state), state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    jax.tree.map(np.testing.assert_array_equal, optalr.upgrade_state(state, state), state)


def test_what_is_missing_or_does_not_fit_is_named(old):
    tx, saved = old
    larger = {**saved["params"], "c": {"w": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match=r"\['c'\]\['w'\].*shape \(2, 2\).*\(3, 3\)"):
        optalr.upgrade_state(saved["state"], tx.init(larger))
    more = {**saved["params"], "d": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"saved has no .*\['d'\]"):
        optalr.upgrade_state(saved["state"], tx.init(more))


def test_a_run_may_go_on_with_a_matched_rate_that_began_without():
    params, grads = {"w": jnp.ones((3, 2))}, {"w": jnp.full((3, 2), 0.5)}

    def make(rate):
        return optalr.tso_alra(
            1e-2,
            switch_at=9,
            second_learning_rate=rate,
            second_momentum=0.9,
            statistics="gradient",
        )

    _, before = make(None).update(grads, make(None).init(params), params)
    saved = flax.serialization.to_state_dict(before)
    state = optalr.upgrade_state(saved, make("matched").init(params))
    assert float(optalr.metrics(state)["gain"]) == 1
    first, second = state[0].inner_state.first, state[0].inner_state.second
    assert float(first.alignment) == float(first.gradient_norm) == 0
    old = before[0].inner_state
    jax.tree.map(np.testing.assert_array_equal, (first.inner_state, second.inner_state), old[2:4])
