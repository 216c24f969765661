"""A user's own arrays."""

import numpy as np
import pytest

from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import Bomb, load_files


def test_a_users_own_arrays(tmp_path):
    path = tmp_path / "mine.npz"
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    np.savez(path, x=x, y=y, x_test=x[:5], y_test=y[:5])
    data = load_files("npz", path)
    assert (data.num_classes, len(data.train), len(data.test)) == (3, 30, 5)
    assert load_files("npz", path, task="regression").train.y.shape == (30, 1)
    np.savez(path, x=x, y=np.array([Bomb(tmp_path / "ran")] * 30))
    with pytest.raises(ExperimentError, match=r"no plain \.npz"):
        load_files("npz", path)
    assert not (tmp_path / "ran").exists()
    np.savez(path, x=x)
    with pytest.raises(ExperimentError, match="needs x and y"):
        load_files("npz", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ExperimentError, match=r"no plain \.npz"):
        load_files("npz", path)
