"""A second stage that goes as far along the gradient as the first did."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optalr
from optalr.phases import matched_stages

DECAY = 0.95
MATRIX = np.array([[3.0, 1.0], [1.0, 0.5]])
EARLY = {"warmup": 0.0, "min_batches": 1}


def gradients(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 2, 2)) + 0.5


def times_matrix():
    return optax.stateless(lambda g, _: jnp.asarray(MATRIX, g.dtype) @ g)


def gain_of(updates, grads):
    """Return the gain in float64."""
    alignment = norm = 0.0
    for u, g in zip(np.asarray(updates, float), np.asarray(grads, float), strict=True):
        length = np.linalg.norm(g)
        alignment = DECAY * alignment + (1 - DECAY) * np.sum(u * g) / length
        norm = DECAY * norm + (1 - DECAY) * length
    return alignment / norm


def feed(tx, grads, params=None):
    params = jnp.zeros((2, 2)) if params is None else params
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(jnp.asarray(g, params.dtype), state, params)
        history.append(updates)
    return history, state


def test_the_second_stage_is_scaled_by_what_the_first_did_along_the_gradient():
    grads = gradients(7)
    history, state = feed(
        matched_stages(times_matrix(), optax.identity(), optalr.switch_at(5)), grads
    )
    first = [MATRIX @ g for g in grads[:5]]
    gain = gain_of(first, grads[:5])
    np.testing.assert_allclose(history[:5], first, rtol=1e-5)
    np.testing.assert_allclose(history[5:], gain * grads[5:], rtol=1e-5)
    np.testing.assert_allclose(optalr.metrics(state)["gain"], gain, rtol=1e-5)


def test_for_gradients_of_one_length_the_gain_is_the_least_squares_fit():
    grads = gradients(12)
    grads /= np.linalg.norm(grads, axis=(1, 2), keepdims=True)
    _, state = feed(matched_stages(times_matrix(), optax.identity(), optalr.switch_at(11)), grads)
    weights = np.sqrt(DECAY ** np.arange(11)[::-1])[:, None]
    of_gradients = (weights * grads[:11].reshape(11, 4)).reshape(-1, 1)
    of_updates = (weights * (MATRIX @ grads[:11]).reshape(11, 4)).ravel()
    (fit,), *_ = np.linalg.lstsq(of_gradients, of_updates, rcond=None)
    np.testing.assert_allclose(optalr.metrics(state)["gain"], fit, rtol=1e-5)


def test_tso_alra_goes_on_with_its_schedule_times_the_gain():
    grads = gradients(10)
    settings = {"statistics": "gradient", "options": EARLY, "update_every": 2}
    alone = optax.chain(optalr.scale_by_kronecker(**settings), optax.trace(0.9))
    gain = gain_of(feed(alone, grads[:6])[0], grads[:6])
    tx = optalr.tso_alra(
        lambda step: 0.1 / (1 + step), switch_at=6, second_learning_rate="matched", **settings
    )
    history, _ = feed(tx, grads)
    for step in range(6, 10):
        expected = -0.1 / (1 + step) * gain * grads[step]
        np.testing.assert_allclose(history[step], expected, rtol=1e-4)


def test_the_scale_of_the_loss_changes_nothing():
    grads = gradients(12)
    tx = optalr.tso_alra(
        0.1,
        switch_at=6,
        second_learning_rate="matched",
        statistics="gradient",
        options=EARLY,
    )
    plain, _ = feed(tx, grads)
    scaled, _ = feed(tx, 1000.0 * grads)
    np.testing.assert_allclose(scaled, plain, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e18])
def test_squares_of_gradients_may_be_out_of_range(size):
    tx = matched_stages(optax.scale(3.0), optax.identity(), optalr.switch_at(3))
    _, state = feed(tx, size * gradients(4))
    np.testing.assert_allclose(optalr.metrics(state)["gain"], 3.0, rtol=1e-5)


def test_a_momentum_of_the_second_stage_does_not_add_to_the_gain():
    grads = [np.full((2, 2), 2.0)] * 200
    finals = [
        feed(
            optalr.tso_alra(
                0.1,
                switch_at=50,
                second_learning_rate="matched",
                second_momentum=momentum,
                statistics="gradient",
            ),
            grads,
        )[0][-1]
        for momentum in (None, 0.9)
    ]
    np.testing.assert_allclose(finals[1], finals[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("first", "switch_at"), [(optax.scale(3.0), 0), (optax.scale(-3.0), 2), (optax.scale(0.0), 2)]
)
def test_without_a_measurement_or_an_agreement_the_gain_is_one(first, switch_at):
    grads = gradients(3)
    tx = matched_stages(first, optax.identity(), optalr.switch_at(switch_at))
    history, state = feed(tx, grads)
    assert float(optalr.metrics(state)["gain"]) == 1
    np.testing.assert_allclose(history[-1], grads[-1], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_gradient_leaves_the_averages(bad):
    grads = gradients(5)
    broken = np.insert(grads, 2, bad, axis=0)
    tx = optalr.tso_alra(
        0.1, switch_at=6, second_learning_rate="matched", statistics="gradient", momentum=None
    )
    history, state = feed(tx, np.concatenate([broken, broken]))
    clean, expected = feed(
        optalr.tso_alra(
            0.1, switch_at=5, second_learning_rate="matched", statistics="gradient", momentum=None
        ),
        np.concatenate([grads, broken]),
    )
    assert np.isfinite(history).all()
    np.testing.assert_allclose(
        optalr.metrics(state)["gain"], optalr.metrics(expected)["gain"], rtol=1e-5
    )
    np.testing.assert_allclose(history[6:], clean[5:], rtol=1e-5)


def test_a_blend_takes_the_gain_where_it_begins():
    grads = gradients(8)
    tx = matched_stages(times_matrix(), optax.identity(), optalr.blend_between(3, 7))
    history, _ = feed(tx, grads)
    gain = gain_of([MATRIX @ g for g in grads[:4]], grads[:4])
    for step, share in zip(range(3, 8), (0, 0.25, 0.5, 0.75, 1), strict=True):
        expected = (1 - share) * MATRIX @ grads[step] + share * gain * grads[step]
        np.testing.assert_allclose(history[step], expected, rtol=1e-5)


@pytest.mark.parametrize("steps_between", [0, 1])
def test_a_first_stage_may_be_released_before_or_after_the_gain_is_taken(steps_between):
    grads = gradients(6)
    tx = matched_stages(times_matrix(), optax.identity(), optalr.switch_at(1_000))
    _, state = feed(tx, grads[:4])
    state = optalr.set_phase(state, 1.0)
    for g in grads[4 : 4 + steps_between]:
        _, state = tx.update(jnp.asarray(g, jnp.float32), state)
    state = optalr.release_first_stage(state)
    updates, _ = tx.update(jnp.asarray(grads[5], jnp.float32), state)
    gain = gain_of([MATRIX @ g for g in grads[:4]], grads[:4])
    np.testing.assert_allclose(updates, gain * grads[5], rtol=1e-5)


def test_half_precision_and_complex_numbers_are_measured_in_float32():
    for dtype, rtol in ((jnp.bfloat16, 1e-2), (jnp.complex64, 1e-5)):
        tx = matched_stages(optax.scale(3.0), optax.identity(), optalr.switch_at(2))
        history, state = feed(tx, gradients(3), jnp.zeros((2, 2), dtype))
        assert history[-1].dtype == dtype
        np.testing.assert_allclose(optalr.metrics(state)["gain"], 3.0, rtol=rtol)


def test_another_word_for_the_second_rate_is_refused():
    with pytest.raises(ValueError, match="second_learning_rate must be one of 'matched'"):
        optalr.tso_alra(0.1, second_learning_rate="same")
