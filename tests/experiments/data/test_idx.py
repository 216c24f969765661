"""MNIST's idx files, good and bad."""

from pathlib import Path

import numpy as np
import pytest

from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import MNIST, damage, idx_bytes, load_files, write_mnist

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("style", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_in_both_styles_raw_and_zipped(tmp_path, style, zipped):
    data = load_files("mnist", write_mnist(tmp_path / "files", style, zipped))
    np.testing.assert_array_equal(data.train.x[..., 0], MNIST["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test.y, MNIST["t10k-labels-idx1-ubyte"])
    assert data.train.x.shape == (40, 28, 28, 1)
    assert data.train.y.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-7], "cut short or damaged"),
        ("train-images-idx3-ubyte", lambda b: b[:6], "cut short or damaged"),
        ("train-images-idx3-ubyte", lambda b: b"PNG" + b, "is no idx file"),
        ("train-images-idx3-ubyte", lambda b: b"", "is no idx file"),
        ("train-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros(39, np.uint8)), "do not belong"),
        ("train-labels-idx1-ubyte", lambda b: idx_bytes(np.full(40, 11, np.uint8)), "not 0 to 9"),
        ("t10k-labels-idx1-ubyte", lambda b: idx_bytes(np.zeros((2, 2), np.uint8)), "exchanged"),
        ("t10k-images-idx3-ubyte", lambda b: b[:12] + b"\xff" * 4, "cut short or damaged"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path, name, change, wanted):
    folder = write_mnist(tmp_path / "files")
    damage(folder, name, change)
    with pytest.raises(ExperimentError, match=wanted):
        load_files("mnist", folder)


def test_bad_gzip_files_are_refused(tmp_path):
    folder = write_mnist(tmp_path / "files", zipped=True)
    damage(folder, "train-images-idx3-ubyte.gz", lambda b: b[:-50])
    with pytest.raises(ExperimentError, match="cut short"):
        load_files("mnist", folder)
    damage(folder, "train-images-idx3-ubyte.gz", lambda b: b"<html>" + b)
    with pytest.raises(ExperimentError, match="no gzip file"):
        load_files("mnist", folder)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_is_the_published_data():
    data = load_files("fashion_mnist", FASHION)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    np.testing.assert_allclose(data.mean.ravel() / 255, 0.2860, atol=1e-4)
    np.testing.assert_allclose(1 / data.scale.ravel() / 255, 0.3530, atol=1e-4)
