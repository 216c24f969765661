"""The measured constant: captured moments against activations, and epochs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.signals.moments import LayerMoments
from tests.transforms.compiling import quick_jit
from tests.transforms.lipschitz_rate.problems import (
    CLASSES,
    EVALUATE,
    classify,
    feed,
    hidden,
    moments,
    network,
    predict,
)


def test_one_update_by_hand_from_captured_moments():
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    tx = optalr.lipschitz_sgd("softmax_cross_entropy", num_classes=CLASSES, weight_decay=0.1)
    updates, state = tx.update(grads, tx.init(params), params, **extras)
    K_z = np.linalg.norm(hidden(params, x))
    max_W = max(np.linalg.norm(layer["w"]) for layer in params.values())
    L = (CLASSES - 1) / (CLASSES * 8) * K_z + 0.1 * max_W
    report = optalr.metrics(state)
    np.testing.assert_allclose(report["activation_norm"], K_z, rtol=1e-5)
    np.testing.assert_allclose(report["lipschitz_constant"], L, rtol=1e-5)
    np.testing.assert_allclose(report["learning_rate"], 1 / L, rtol=1e-5)
    expected = jax.tree.map(lambda g, w: -(g + 0.1 * w) / L, grads, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)
    standalone = optalr.lipschitz_rate(
        "softmax", hidden(params, x), params, num_classes=CLASSES, weight_decay=0.1
    )
    np.testing.assert_allclose(report["learning_rate"], standalone.learning_rate, rtol=1e-5)


def test_the_papers_own_numbers_in_training():
    tx = optalr.scale_by_lipschitz_rate("softmax", num_classes=10, weight_decay=1e-3)
    w = jnp.full((6, 2), 43.257 / 12**0.5)
    _, state = tx.update(w, tx.init(w), w, head=moments(206.695, size=128))
    assert round(float(state.learning_rate), 3) == 0.668


def test_binary_cross_entropy_and_least_squares():
    params, x, y = network()
    target = jnp.stack([y, y, y], axis=1).astype(jnp.float32)
    loss = optalr.composite_loss(
        predict, lambda out, x, t: 0.5 * jnp.sum((out - t) ** 2) / out.shape[0]
    )
    _, grads, extras = quick_jit(optalr.value_grad_and_extras(loss))(params, x, target)
    norm = float(jnp.linalg.norm(target))
    tx = optalr.lipschitz_sgd("least_squares", target_norm=norm)
    _, state = quick_jit(tx.update)(grads, tx.init(params), params, **extras)
    K_z, K_a = np.linalg.norm(hidden(params, x)), np.linalg.norm(predict(params, x, y))
    expected = 8 / ((K_a + norm) * K_z)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], expected, rtol=1e-5)
    late = optalr.lipschitz_sgd("least_squares")
    _, state = quick_jit(late.update)(grads, late.init(params), params, **extras, target_norm=norm)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], expected, rtol=1e-5)
    with pytest.raises(TypeError, match="target_norm"):
        late.update(grads, late.init(params), params, **extras)
    with pytest.raises(TypeError, match=r"outputs.*composite_loss"):
        late.update(grads, late.init(params), params, head=extras["head"], target_norm=1.0)

    rates, _ = feed(optalr.scale_by_lipschitz_rate("binary_cross_entropy"), [4.0])
    np.testing.assert_allclose(rates, 2 * 8 / 4.0)


def test_an_input_on_the_other_side_and_many_positions():
    across = LayerMoments(
        rows=jnp.eye(2),
        cols=jnp.eye(3),
        row_mean=None,
        col_mean=jnp.zeros(3),
        count=jnp.float32(4),
        positions=jnp.float32(5),
    )
    w = jnp.ones((2, 3))
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    _, state = tx.update(w, tx.init(w), w, head=across)
    np.testing.assert_allclose(state.activation_norm, 60**0.5, rtol=1e-6)  # NT tr(A) = 4·5·3
    np.testing.assert_allclose(state.learning_rate, 2 * 20 / 60**0.5, rtol=1e-6)


def test_a_named_last_layer():
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    tx = optalr.scale_by_lipschitz_rate("softmax", num_classes=CLASSES, last_layer="['first']['w']")
    _, state = tx.update(grads, tx.init(params), params, **extras)
    np.testing.assert_allclose(state.activation_norm, np.linalg.norm(x), rtol=1e-5)
    wrong = optalr.scale_by_lipschitz_rate("softmax", num_classes=CLASSES, last_layer="first")
    with pytest.raises(ValueError, match=r"last_layer.*\['first'\]\['w'\]"):
        wrong.update(grads, tx.init(params), params, **extras)


def test_a_rate_an_epoch_takes_the_largest_of_the_epoch_that_ended():
    tx = optalr.scale_by_lipschitz_rate("sigmoid", steps_per_epoch=3)
    norms = [1.0, 4.0, 2.0, 8.0, 3.0, 3.0, 5.0, 1.0]
    in_force = [1.0, 4.0, 4.0, 4.0, 4.0, 4.0, 8.0, 8.0]  # the first epoch follows the maximum
    rates, state = feed(tx, norms)
    np.testing.assert_allclose(rates, 16 / np.asarray(in_force), rtol=1e-6)
    assert float(state.activation_norm) == 5.0


def test_each_step_has_its_own_rate_and_no_signals_hold_it():
    tx = optalr.scale_by_lipschitz_rate("sigmoid")
    rates, state = feed(tx, [1.0, 4.0, 2.0])
    np.testing.assert_allclose(rates, [16, 4, 8], rtol=1e-6)
    assert bool(optalr.wants_signals(state))
    params, x, y = network()
    w = jnp.ones((6, 2))
    off = jax.tree.map(jnp.zeros_like, moments(jnp.float32(3.0)))
    _, state = tx.update(w, state, w, head=off)
    np.testing.assert_allclose(state.learning_rate, 8, rtol=1e-6)
    assert int(state.failures) == 0
    evaluate = quick_jit(optalr.value_grad_and_extras(classify))
    _, grads, extras = evaluate(params, x, y, signals=jnp.zeros((), bool))
    tx = optalr.lipschitz_sgd("softmax", num_classes=3, guards={"warmup_rate": 0.25})
    _, state = tx.update(grads, tx.init(params), params, **extras)
    np.testing.assert_allclose(optalr.metrics(state)["learning_rate"], 0.25)
