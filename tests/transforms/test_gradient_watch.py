"""The watch over gradients: faults are seen at any scale, also in the second step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optalr.transforms.shared.gradient_watch import admit, start_gradient_watch


def gradients(scale, num_steps):
    keys = jax.random.split(jax.random.key(0), num_steps)
    return [scale * jax.random.normal(key, (1000,)) for key in keys]


def norm(tree):
    return float(np.linalg.norm(np.asarray(tree, np.float64)))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15, 1e-8, 1.0, 1e8, 1e18, 1e25, 1e33])
def test_an_outlier_is_shortened_at_any_scale(scale):
    watch = start_gradient_watch()
    for i, gradient in enumerate(gradients(scale, 5)):
        is_outlier = i == 3
        given = admit(gradient * (1e3 if is_outlier else 1), watch, squares=False)
        watch = given.watch
        assert bool(given.failed) == is_outlier
        assert 25 < norm(given.updates) / scale < 40
    assert int(watch.num_long) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_what_is_not_finite_becomes_zeros(bad, scale):
    first, second = gradients(scale, 2)
    given = admit(first.at[3].set(bad), start_gradient_watch(), squares=False)
    assert bool(given.bad)
    assert norm(given.updates) == 0
    given = admit(second, given.watch, squares=False)
    assert not bool(given.failed)
    np.testing.assert_array_equal(given.updates, second)


def test_zeros_and_nothing_say_nothing():
    for empty in ({}, {"a": jnp.zeros((0, 3))}, {"a": jnp.zeros(3)}):
        given = admit(empty, start_gradient_watch())
        assert not bool(given.failed)
        assert float(given.watch.largest_norm) == 0
