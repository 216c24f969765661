"""Data that is always there, and how it is split."""

from pathlib import Path

import numpy as np
import pytest

from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import Raw, Split, load, split
from optalr.experiments.errors import ExperimentError

FASHION = Path("/usr/share/datasets/fashion-mnist")


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


def test_nothing_left_to_test_on_is_refused():
    with pytest.raises(ExperimentError, match="test_fraction"):
        _split(_raw(), test_fraction=0.0)


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "classes"),
    [
        ("digits", (8, 8, 1), (1294, 144, 359), 10),
        ("breast_cancer", (30,), (409, 46, 114), 2),
        ("diabetes", (10,), (319, 35, 88), 1),
        ("boston", (13,), (365, 40, 101), 1),
        ("mnist_5k", (28, 28, 1), (3600, 400, 1000), 10),
        ("python_docs", (64,), None, None),
    ],
)
def test_data_that_ship_with_packages(name, shape, sizes, classes):
    data = load(DataConfig(name=name))
    assert data.train.x.shape[1:] == shape
    if sizes:
        assert (len(data.train), len(data.validation), len(data.test)) == sizes
        assert data.num_classes == classes


def test_boston_carries_its_caveat_and_column_b_can_be_dropped():
    assert "column B" in load(DataConfig(name="boston")).note
    dropped = load(DataConfig(name="boston", drop_b=True))
    assert dropped.train.x.shape[1] == 12
    assert not dropped.note


def test_boston_is_the_published_data():
    data = load(DataConfig(name="boston", test_fraction=106 / 506, validation_fraction=0.0))
    assert (len(data.train), len(data.test)) == (400, 106)
    x = np.concatenate([data.train.x, data.test.x]).astype(np.float64)
    y = np.concatenate([data.train.y, data.test.y]).astype(np.float64).ravel()
    design = np.column_stack([x, np.ones(len(x))])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert abs(1 - residual.var() / y.var() - 0.7406) < 1e-4
    assert abs(y.mean() - 22.533) < 1e-3


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_is_the_published_data():
    data = load(DataConfig(name="fashion_mnist", folder=str(FASHION), validation_fraction=0.0))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    np.testing.assert_allclose(data.mean.ravel() / 255, 0.2860, atol=1e-4)
    np.testing.assert_allclose(1 / data.scale.ravel() / 255, 0.3530, atol=1e-4)


def test_mnist1d_names_its_package_where_it_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ExperimentError, match="pip install mnist1d"):
        load(DataConfig(name="mnist1d"))


def test_mnist1d_is_made_alike_each_time():
    pytest.importorskip("mnist1d")
    options = {"num_samples": 100}
    first, second = (load(DataConfig(name="mnist1d", **options)) for _ in range(2))
    assert first.train.x.shape[1:] == (40, 1)
    assert len(first.test) == 20
    np.testing.assert_array_equal(first.train.x, second.train.x)
