import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.1, -0.2])}


def run(tx, params, num_steps=20):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(num_steps):
        updates, state = update(params, state, params)  # the gradient of |θ|²/2
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    "rule",
    [*optalr.CLASSICAL_RULES, optax.scale_by_adam(b2=0.9)],
    ids=[*optalr.CLASSICAL_RULES, "a transformation"],
)
def test_a_classical_rule_is_optax_at_the_same_rate(rule):
    direction = optalr.CLASSICAL_RULES[rule]() if isinstance(rule, str) else rule
    schedule = optalr.schedules.halving(0.1, 7)
    reference = optax.chain(direction, optax.scale_by_learning_rate(schedule))
    ours, state = run(optalr.classical(rule, schedule), PARAMS)
    theirs, _ = run(reference, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.025, rtol=1e-6)


def test_gains_speed_up_a_steady_descent():
    plain, _ = run(optalr.classical("sgd", 0.01), PARAMS)
    gained, _ = run(optalr.classical("sgd", 0.01, gains=optalr.scale_by_local_gains(0.3)), PARAMS)
    assert optax.tree.norm(gained) < 0.8 * optax.tree.norm(plain)


def test_rmsprop_has_epsilon_outside_the_root():
    tx = optalr.classical("rmsprop", 1.0)
    g = jnp.array([1e-8])
    updates, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(updates, -1e-8 / (np.sqrt(0.1) * 1e-8 + 1e-8), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_runs_in_single(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda x: x * 0, params)  # optax's float16 Adam gives 0/0 here
    tx = optalr.guard(optax.adam(0.1))
    updates, state = tx.update(grads, tx.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert state.inner_state[0].nu["w"].dtype == jnp.float32


def test_a_bad_gradient_leaves_the_state():
    tx = optalr.guard(optax.adam(0.1))
    _, state = run(tx, PARAMS, 2)
    bad = {**PARAMS, "b": jnp.array([jnp.inf, 0.0])}
    updates, after = tx.update(bad, state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert int(after.failures) == 1


def test_arguments_are_refused_at_construction():
    with pytest.raises(ValueError, match="rule must be one of 'sgd'"):
        optalr.classical("sdg", 0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        optalr.classical("sgd", -0.1)
    with pytest.raises(TypeError, match="inner"):
        optalr.guard(0.1)
