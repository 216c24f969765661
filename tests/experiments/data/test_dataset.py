"""How data are split and standardized."""

import jax.numpy as jnp
import numpy as np
import pytest

from optalr.experiments.data import Raw, Split, split
from optalr.experiments.errors import ExperimentError


def _raw(count=100):
    x = np.arange(count, dtype=np.float32)[:, None]
    return Raw(Split(x, np.arange(count, dtype=np.int32)), None, "classification", count, "feature")


def _split(raw, **changes):
    settings = {"test_fraction": 0.2, "validation_fraction": 0.1, "split_seed": 0} | changes
    return split("some", raw, **settings)


def test_splits_are_disjoint_whole_and_by_seed():
    data = _split(_raw())
    parts = [data.train.y, data.validation.y, data.test.y]
    assert [len(part) for part in parts] == [72, 8, 20]
    assert sorted(np.concatenate(parts)) == list(range(100))
    np.testing.assert_array_equal(_split(_raw()).test.y, data.test.y)
    assert not np.array_equal(_split(_raw(), split_seed=1).test.y, data.test.y)


def test_a_limit_keeps_the_same_held_out_examples():
    whole, small = _split(_raw()), _split(_raw(), limit=10)
    assert len(small.train) == 10
    np.testing.assert_array_equal(whole.test.y, small.test.y)
    np.testing.assert_array_equal(whole.validation.y, small.validation.y)


def test_training_examples_are_standardized_and_constants_are_dropped():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (500, 3)).astype(np.float32)
    x[:, 1] = 7.0
    raw = Raw(Split(x, np.zeros(500, np.int32)), None, "classification", 1, "feature")
    data = _split(raw)
    prepared = np.asarray(data.prepare(data.train.x))
    np.testing.assert_allclose(prepared.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(prepared.std(0), [1, 0, 1], atol=1e-4)


def test_bytes_are_divided_by_255_where_that_is_wanted():
    images = np.array([0, 51, 255, 102], np.uint8).reshape(4, 1, 1, 1)
    raw = Raw(Split(images, np.arange(4)), None, "classification", 4, standardize="unit")
    data = _split(raw, test_fraction=0.25, validation_fraction=0.0)
    prepared = np.asarray(data.prepare(jnp.asarray(data.train.x)))
    np.testing.assert_allclose(prepared, data.train.x / 255, rtol=1e-6)


def test_nothing_left_to_test_on_is_refused():
    with pytest.raises(ExperimentError, match="test_fraction"):
        _split(_raw(), test_fraction=0.0)
