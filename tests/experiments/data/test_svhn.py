"""SVHN's .mat files, good and bad."""

import numpy as np
import pytest

from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import damage, load_files, write_svhn


def test_svhn_calls_ten_zero(tmp_path):
    write_svhn(tmp_path)
    data = load_files("svhn", tmp_path)
    assert data.train.y[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 12), np.uint8)
    np.testing.assert_array_equal(data.train.x[5], pixels[..., 5])
    assert len(load_files("svhn", tmp_path, extra=True).train) == 24


@pytest.mark.parametrize("change", [lambda b: b[:500], lambda b: b"nothing", lambda b: b""])
def test_bad_svhn_files_are_refused(tmp_path, change):
    write_svhn(tmp_path)
    damage(tmp_path, "train_32x32.mat", change)
    with pytest.raises(ExperimentError, match="cut short or no SVHN file"):
        load_files("svhn", tmp_path)


def test_a_mat_file_of_other_shapes_is_refused(tmp_path):
    from scipy.io import savemat

    write_svhn(tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((3, 3)), "y": np.zeros(3)})
    with pytest.raises(ExperimentError, match="not the cropped SVHN"):
        load_files("svhn", tmp_path)
