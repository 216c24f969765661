"""The rate where the direction is averaged: momentum and Adam."""

import jax.numpy as jnp
import numpy as np

import optalr
from tests.transforms.lipschitz_rate.problems import EVALUATE, feed, hidden, moments, network


def test_momentum_averages_the_constant():
    tx = optalr.scale_by_lipschitz_rate("sigmoid", averages=(0.5,))
    rates, _ = feed(tx, [4.0, 4.0, 8.0])
    K, expected = 0.0, []
    for L in (0.25, 0.25, 0.5):
        K = 0.5 * K + 0.5 * L
        expected.append(1 / K)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # With v ← βv + (1−β)g of a constant gradient, the step is g / L from the first on.
    recipe = optalr.lipschitz_sgd("sigmoid", momentum=0.5)
    w = jnp.ones((6, 2))
    state = recipe.init(w)
    for _ in range(3):
        updates, state = recipe.update(w, state, w, head=moments(4.0))
        np.testing.assert_allclose(updates, -4 * w, rtol=1e-6)


def test_adam_divides_the_root_of_the_average_of_squares():
    norms, dim, c = [4.0, 6.0], 6, 1 / 16
    tx = optalr.scale_by_lipschitz_rate("sigmoid", averages=(0.9, 0.99), weight_decay=0.1)
    rates, _ = feed(tx, norms)
    K1 = K2 = 0.0
    max_W = 12**0.5
    for t, norm in enumerate(norms, start=1):
        quads = np.sqrt(8 * dim * (norm**2 / 8 / dim) ** 2)  # √(N Σ_j A_jj²)
        K1 = 0.9 * K1 + 0.1 * (c * norm + 0.1 * max_W)
        K2 = 0.99 * K2 + 0.01 * (c**2 * quads + 2 * 0.1 * max_W * c * norm)
        expected = np.sqrt(K2 / (1 - 0.99**t)) / (K1 / (1 - 0.9**t))
        np.testing.assert_allclose(rates[t - 1], expected, rtol=1e-5)
    params, x, y = network()
    _, grads, extras = EVALUATE(params, x, y)
    given = optalr.scale_by_lipschitz_rate("softmax", num_classes=3, averages=(0.9, 0.999))
    a = hidden(params, x)
    _, exact = given.update(grads, given.init(params), params, **extras, activations=a)
    _, bound = given.update(grads, given.init(params), params, **extras)
    c = 2 / (3 * 8)
    expected = np.sqrt(c**2 * np.linalg.norm(a * a)) / (c * np.linalg.norm(a))
    np.testing.assert_allclose(exact.learning_rate, expected, rtol=1e-4)
    assert 0.5 * expected < float(bound.learning_rate) <= expected * 1.0001
