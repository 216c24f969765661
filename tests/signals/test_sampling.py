"""Moments of a sample of examples and positions estimate those of all, without bias."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optalr
from optalr.signals.tracing.sampling import comb, scatter
from tests.signals.reference import standard_normal


@pytest.mark.parametrize("pick", [comb, scatter])
@pytest.mark.parametrize(("length", "keep"), [(1, 1), (7, 7), (12, 5), (30, 4), (64, 9)])
def test_each_index_is_as_likely_as_every_other(pick, length, keep):
    starts = jnp.arange(3 * length, dtype=jnp.uint32)
    chosen = np.asarray(jax.vmap(lambda seed: pick(length, keep, seed))(starts))
    assert all(len(set(row)) == keep for row in chosen)
    counts = np.bincount(chosen.ravel(), minlength=length)
    np.testing.assert_array_equal(counts, 3 * keep)


def test_positions_of_an_image_do_not_share_a_column():
    chosen = np.asarray(scatter(32 * 32, 16, jnp.uint32(5)))
    assert len(set(chosen % 32)) > 8
    assert len(set(chosen // 32)) > 8


def conv_loss(params, x, y, scale):
    numbers = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    out = jnp.tanh(h).mean((1, 2)) @ params["out"]
    return scale * jnp.mean(jnp.sum((out - y) ** 2, 1))


@pytest.fixture(scope="module")
def problem():
    params = {"conv": standard_normal(0, 2, 2, 2, 3)}
    params["out"] = standard_normal(1, 3, 2)
    x = standard_normal(2, 6, 4, 3, 2)
    x = x + jnp.linspace(-1, 1, 4)[None, :, None, None]  # what a position sees depends on it
    return params, x, jnp.linspace(-2, 2, 12).reshape(6, 2)


@pytest.fixture(scope="module")
def full_moments(problem):
    return jax.jit(optalr.value_grad_and_extras(conv_loss))(*problem, 1.0)[2]["signals"]


def sampled_moments(problem, num_steps, **options):
    """Moments of ``num_steps`` steps, whose losses differ by a factor that is divided out."""
    evaluate = optalr.value_grad_and_extras(conv_loss, **options)
    scales = jax.random.uniform(jax.random.key(3), (num_steps,), minval=0.5)
    signals = jax.jit(jax.vmap(lambda s: evaluate(*problem, s)[2]["signals"]))(scales)
    over = lambda m: dataclasses.replace(m, cols=m.cols / scales[:, None, None] ** 2)  # noqa: E731
    return {name: over(m) for name, m in signals.items()}


@pytest.mark.parametrize(
    "options", [{"every": 3}, {"max_positions": 5}, {"every": 2, "max_positions": 3}]
)
def test_the_mean_over_many_steps_is_the_full_moment(problem, full_moments, options):
    steps, full = 4000, full_moments
    sampled = sampled_moments(problem, steps, **options)
    for name in ("conv", "out"):
        assert np.all(sampled[name].count == full[name].count)
        np.testing.assert_allclose(sampled[name].positions, full[name].positions, rtol=1e-6)
        for field in ("rows", "cols", "row_mean"):
            values = np.asarray(getattr(sampled[name], field), np.float64)
            want = np.asarray(getattr(full[name], field))
            error = values.std(0) / np.sqrt(steps)
            slack = 1e-5 * np.abs(want).max()
            assert np.all(np.abs(values.mean(0) - want) <= 5 * error + slack), (name, field)
    if "every" in options:
        assert np.asarray(sampled["out"].cols).std(0).max() > 0


def test_softmax_cotangents_which_sum_to_zero_start_samples_at_different_places():
    params = standard_normal(0, 3, 2)
    x = standard_normal(1, 8, 3)

    def loss(w, x, scale):
        return -jnp.mean(jax.nn.log_softmax(scale * (x @ w))[:, 0])

    evaluate = optalr.value_grad_and_extras(loss, every=8)
    scales = jnp.linspace(1.0, 1.001, 64)
    cols = jax.jit(jax.vmap(lambda s: evaluate(params, x, s)[2]["signals"].rows))(scales)
    assert len(np.unique(np.asarray(cols)[:, 0, 0])) == 8
