"""The recipe without a rate: its chain, its schedule, its decay, and what it does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["last"] - y) ** 2)


def data(count, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (count, 5))
    return x, jnp.sin(x[:, :1]) + 0.1 * jax.random.normal(keys[1], (count, 1))


def start():
    keys = jax.random.split(jax.random.key(3))
    return {
        "first": 0.5 * jax.random.normal(keys[0], (5, 8)),
        "last": 0.3 * jax.random.normal(keys[1], (8, 1)),
    }


def train(tx, steps, *, scale=1.0, probe=True, count=64):
    """Return the parameters and the state, and the metrics of every step."""

    def scaled(params, x, y):
        return scale * loss_fn(params, x, y)

    evaluate, held_out = optalr.value_grad_and_extras(scaled), data(32, seed=9)
    batch = data(count)

    def step(carry, _):
        params, state = carry
        _, grads, extras = evaluate(params, *batch, signals=optalr.wants_signals(state))
        if probe:
            x, y = held_out
            extras["validation_value_fn"] = jax.tree_util.Partial(scaled, x=x, y=y)
        updates, state = tx.update(grads, state, params, **extras)
        return (optax.apply_updates(params, updates), state), optalr.metrics(state)

    params = start()
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))
    (params, state), read = run((params, tx.init(params)))
    return params, state, read


def test_it_is_the_chain_that_its_docstring_writes_down():
    total = 120
    rates = optax.warmup_cosine_decay_schedule(0.03, 0.06, 2, total, 0.0)
    chain = optax.chain(
        optalr.scale_by_kronecker(
            damping=0.1, update_every=3, options={"warmup": 0, "min_batches": 1}
        ),
        optax.trace(0.7),
        optalr.add_learned_decay(3 / (0.06 * total / 2), meta_rate=30 / total, min_factor=1e-4),
        optalr.scale_by_recorded_rate(lambda count: jnp.where(count == 1, 0.06, rates(count))),
    )
    ours, theirs = train(optalr.untuned(total), total)[0], train(chain, total)[0]
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, atol=1e-5)


def test_the_rate_rises_over_a_fiftieth_falls_to_zero_and_stays_there():
    read = train(optalr.untuned(100, scale=2.0), 103)[2]
    rates = np.asarray(read["learning_rate"])
    assert rates[0] == pytest.approx(0.06, rel=1e-6)  # half of the peak: a warm-up of two steps
    assert rates.argmax() in (1, 2)
    assert rates.max() == pytest.approx(0.12, rel=1e-3)
    assert np.all(np.diff(rates[3:100]) < 0)
    np.testing.assert_allclose(rates[100:], 0.0, atol=1e-9)


def test_without_a_known_end_the_rate_falls_as_an_inverse_root():
    tx = optalr.untuned(None, statistics="gradient", warmup_steps=1)
    params = {"w": jnp.ones((3, 2))}
    state = tx.init(params)
    far = jax.tree.map(lambda leaf: leaf + 3000 if leaf.dtype == jnp.int32 else leaf, state[3])
    _, state = jax.jit(tx.update)(params, (*state[:3], far), params)
    assert float(optalr.metrics(state)["learning_rate"]) == pytest.approx(0.06 / 2, rel=1e-3)


def test_without_a_validation_loss_the_decay_shrinks_weights_by_e_to_the_minus_three_in_all():
    read = train(optalr.untuned(200), 200, probe=False)[2]
    decays, rates = np.asarray(read["weight_decay"]), np.asarray(read["learning_rate"])
    assert np.ptp(decays) == 0
    assert np.sum(decays * rates) == pytest.approx(3.0, rel=0.03)
    assert not np.any(read["failures"])


def test_a_validation_loss_moves_the_decay_and_metrics_shows_it():
    read = train(optalr.untuned(200), 200)[2]
    assert np.ptp(np.asarray(read["weight_decay"])) > 0
    assert {"learning_rate", "weight_decay", "hypergradient", "root_residual", "failures"} <= {
        *read
    }


@pytest.mark.parametrize("total", [4, 20, 60])
def test_a_short_run_shrinks_weights_by_a_fifth_in_a_step_at_most(total):
    tx = optalr.untuned(total, statistics="gradient", warmup_steps=1)
    params = {"w": jnp.ones((3, 2))}
    state, zeros, shrunk = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
    # A loss that falls as the weights do: it asks for all the decay that it can get.
    falling = jax.tree_util.Partial(lambda p: jnp.sum(p["w"]))
    update = jax.jit(tx.update)
    for _ in range(total):
        updates, state = update(zeros, state, params, validation_value_fn=falling)
        shrunk.append(float(-updates["w"][0, 0] / params["w"][0, 0]))
        params = optax.apply_updates(params, updates)
    assert max(shrunk) <= 0.2 * (1 + 1e-5)


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**12])
def test_the_scale_of_the_loss_changes_nothing(factor):
    plain, scaled = (train(optalr.untuned(60), 60, scale=s)[0] for s in (1.0, factor))
    for name in plain:
        np.testing.assert_allclose(scaled[name], plain[name], rtol=2e-3, atol=1e-4)


def test_a_batch_repeated_four_times_is_the_same_batch():
    """F is that of one example, so the number of examples cancels."""
    x, y = data(16)
    four = jnp.tile(x, (4, 1)), jnp.tile(y, (4, 1))
    evaluate, tx, params = optalr.value_grad_and_extras(loss_fn), optalr.untuned(50), start()
    steps = []
    for batch in ((x, y), four):
        _, grads, extras = evaluate(params, *batch)
        steps.append(tx.update(grads, tx.init(params), params, **extras)[0])
    for name in params:
        np.testing.assert_allclose(steps[0][name], steps[1][name], rtol=2e-3, atol=1e-6)


def test_less_momentum_takes_a_larger_rate():
    tx = optalr.untuned(100, momentum=0.0, warmup_steps=1, statistics="gradient")
    params = {"w": jnp.ones((3, 2))}
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert float(optalr.metrics(state)["learning_rate"]) == pytest.approx(0.2, rel=1e-3)


def test_all_its_numbers_may_be_injected():
    tx = optax.inject_hyperparams(optalr.untuned)(100, statistics="gradient")
    fixed = optalr.untuned(100, statistics="gradient")
    params = {"w": jnp.ones((3, 2))}
    results = []
    for one in (tx, fixed):
        state, moved = one.init(params), params
        for _ in range(4):
            updates, state = jax.jit(one.update)(moved, state, moved)
            moved = optax.apply_updates(moved, updates)
        results.append(moved["w"])
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("total_steps", 0, ValueError),
        ("total_steps", 10.5, TypeError),
        ("scale", 0.0, ValueError),
        ("scale", float("nan"), ValueError),
        ("momentum", 1.0, ValueError),
        ("damping", -1.0, ValueError),
        ("update_every", 0, ValueError),
        ("warmup_steps", 0, ValueError),
        ("learn_every", 0, ValueError),
        ("statistics", "curvature", ValueError),
    ],
)
def test_a_bad_argument_is_named(argument, value, error):
    with pytest.raises(error, match=argument):
        optalr.untuned(**{"total_steps": 100, argument: value})


def test_signals_are_asked_for_by_name():
    params = start()
    tx = optalr.untuned(10)
    with pytest.raises(TypeError, match="signals"):
        tx.update(params, tx.init(params), params)
