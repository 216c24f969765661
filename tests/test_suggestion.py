"""The rate suggestion: agreement, its honest absence, and its picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.suggestion import summarize


def regression(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (128, 5))
    y = x @ jnp.arange(5.0) + 0.1 * jax.random.normal(keys[1], (128,))
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 128, 32)]


def loss_fn(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def test_starts_agree_on_the_rate_of_a_regression():
    batches = regression()
    w = jnp.zeros(5)
    found = optalr.suggest_learning_rate(loss_fn, w, batches, num_steps=40)
    assert found.agreed
    spectra = [np.linalg.eigvalsh(x.T @ x / len(x)) for x, _ in batches]
    # On a step's own batch every rate is the inverse of a Rayleigh quotient of its Hessian.
    # On the next batch it is gᵀg'/gᵀH'g, to which that bound does not apply.
    own = optalr.suggest_learning_rate(loss_fn, w, batches, num_steps=40, fresh_probe=False)
    largest, smallest = max(e[-1] for e in spectra), min(e[0] for e in spectra)
    assert 1 / largest < own.rate < 1 / smallest
    assert 0.2 * own.rate < found.rate < 5 * own.rate
    assert found.low <= found.rate <= found.high
    assert found.rates.shape == found.losses.shape == (5, 40)
    np.testing.assert_allclose(found.starts, [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert "suggested learning rate" in str(found)
    axes = found.plot()
    assert len(axes.get_lines()) == 6
    np.testing.assert_array_equal(w, jnp.zeros(5))
    # A function of the step, aux, and other options give the same answer.
    again = optalr.suggest_learning_rate(
        lambda w, x, y: (loss_fn(w, x, y), x),
        w,
        lambda i: batches[i % 4],
        num_steps=40,
        has_aux=True,
        options={"derivatives": "exact"},
    )
    np.testing.assert_allclose(again.rate, found.rate, rtol=1e-3)


def test_no_rate_is_suggested_where_the_starts_disagree_or_diverge():
    starts, losses = np.array([0.01, 1.0]), np.array([[2.0] * 2 + [1.0] * 4] * 2)
    apart = summarize(starts, np.tile([[0.01], [1.0]], 6), losses, tolerance=2.0)
    assert not apart.agreed
    assert np.isnan(apart.rate)
    assert "settle apart" in str(apart)
    diverged = losses.copy()
    diverged[1, -1] = np.nan
    alone = summarize(starts, np.full((2, 6), 0.1), diverged, tolerance=2.0)
    assert not alone.agreed
    assert "left out" in str(alone)
    assert "fewer than two" in alone.verdict
    assert summarize(starts, np.full((2, 6), 0.1), losses, tolerance=2.0).agreed


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"starts": (0.1,)}, "starts"),
        ({"starts": (0.1, -1.0)}, "starts"),
        ({"num_steps": 2}, "num_steps"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"batches": []}, "batches"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        optalr.suggest_learning_rate(loss_fn, jnp.zeros(5), **{"batches": regression(), **options})
