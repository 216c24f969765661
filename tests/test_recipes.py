"""What recipes add to the pieces that they chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr


@pytest.mark.parametrize("second_rate", [None, 0.1])
def test_the_second_stage_may_have_a_momentum_that_starts_from_zero(second_rate):
    tx = optalr.tso_alra(
        0.1,
        switch_at=2,
        second_learning_rate=second_rate,
        second_momentum=0.9,
        statistics="gradient",
    )
    params = {"w": jnp.ones((3, 2))}
    grads = {"w": jnp.full((3, 2), 2.0)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(grads, state, params)
    for total in (1.0, 1.0 + 0.9, 1.0 + 0.9 + 0.81):
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(updates["w"], -0.1 * 2.0 * total * np.ones((3, 2)), rtol=1e-6)


def test_a_second_momentum_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="second_momentum"):
        optalr.tso_alra(0.1, second_momentum=1.0)


@pytest.mark.parametrize("second_rate", [None, 0.05])
def test_weight_decay_is_decoupled_and_spares_vectors(second_rate):
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = optalr.tso_alra(
        0.1,
        switch_at=1,
        second_learning_rate=second_rate,
        statistics="gradient",
        weight_decay=0.5,
    )
    state = tx.init(params)
    for rate in (0.1, second_rate or 0.1):  # one update in each phase; nothing but the decay moves
        updates, state = tx.update(grads, state, params)
        np.testing.assert_allclose(updates["kernel"], -rate * 0.5 * params["kernel"], rtol=1e-6)
        np.testing.assert_array_equal(updates["bias"], 0)
        params = optax.apply_updates(params, updates)


def test_no_decay_adds_nothing_to_the_state_and_a_negative_one_is_refused():
    structures = [
        jax.tree.structure(
            optalr.tso_alra(0.1, statistics="gradient", **more).init(jnp.ones((2, 2)))
        )
        for more in ({}, {"weight_decay": 0.0})
    ]
    assert structures[0] == structures[1]
    with pytest.raises(ValueError, match="weight_decay"):
        optalr.tso_alra(0.1, weight_decay=-1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.inject_hyperparams(optalr.tso_alra)(0.1),
        lambda: optax.inject_hyperparams(optalr.lipschitz_sgd)("softmax", num_classes=2),
        lambda: optax.inject_hyperparams(optalr.lipschitz_adam)("softmax", num_classes=2),
    ],
    ids=["tso_alra", "lipschitz_sgd", "lipschitz_adam"],
)
def test_recipes_with_their_defaults_may_be_injected(make):
    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    tx, params, x = make(), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    _, grads, extras = optalr.value_grad_and_extras(loss_fn)(params, x)
    state = tx.init(params)
    updates, after = jax.jit(lambda g, s, p, e: tx.update(g, s, p, **e))(
        grads, state, params, extras
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert bool(jnp.any(updates["w"] != 0))


@pytest.mark.parametrize("shape", [(), (4,), (0, 3), (4, 2)])
def test_one_bare_array_may_be_all_parameters(shape):
    params = jnp.ones(shape)
    tx = optalr.tso_alra(0.1)
    evaluate = optalr.value_grad_and_extras(lambda p: jnp.sum(jnp.square(p - 2)))
    _, grads, extras = evaluate(params)
    updates, _ = tx.update(grads, tx.init(params), params, **extras)
    assert updates.shape == shape
    assert bool(jnp.all(updates > 0))
