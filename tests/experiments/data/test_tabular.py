"""Data that ship with packages or that are made."""

import sys

import numpy as np
import pytest

from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import load
from optalr.experiments.errors import ExperimentError


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


def test_mnist1d_names_its_package_where_it_is_missing(monkeypatch):
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
