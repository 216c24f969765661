"""CIFAR's pickles and binary files, good and bad."""

import pickle

import numpy as np
import pytest

from optalr.experiments.data import images
from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import (
    Bomb,
    cifar10_files,
    cifar100_files,
    cifar_rows,
    damage,
    load_files,
    write_tar,
    write_tree,
)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_in_both_formats_unpacked_and_packed(tmp_path, binary, packed):
    files = cifar10_files(binary)
    if packed:
        kind = "binary" if binary else "python"
        write_tar(tmp_path / f"cifar-10-{kind}.tar.gz", files)
    else:
        write_tree(tmp_path, files)
    data = load_files("cifar10", tmp_path)
    rows, labels = cifar_rows(4, 10, 0)
    assert data.train.x.shape == (20, 32, 32, 3)
    # A row is the red plane, then green, then blue, each by rows.
    assert data.train.x[1, 2, 3, 1] == rows[1, 1024 + 2 * 32 + 3]
    assert data.train.y[:4].tolist() == labels
    assert len(data.test) == 4


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_fine_coarse_and_without_contradictions(tmp_path, binary):
    files, fine, coarse = cifar100_files(binary)
    write_tree(tmp_path, files)
    assert load_files("cifar100", tmp_path).train.y.tolist() == fine
    assert load_files("cifar100", tmp_path, labels="coarse").train.y.tolist() == coarse
    data = load_files("cifar100", tmp_path, drop_contradictions=True)
    assert data.train.y.tolist() == [fine[0], fine[2], fine[4], fine[5]]
    assert len(data.test) == 6
    with pytest.raises(ExperimentError, match=r"data\.labels must be"):
        load_files("cifar100", tmp_path, labels="both")


def test_contradictions_are_images_with_two_labels():
    x = np.array([[1, 2], [1, 2], [3, 4], [3, 4], [5, 6]], np.uint8)
    part = images.Split(x, np.array([0, 1, 2, 2, 3], np.int32))
    assert images.contradictory(part).tolist() == [True, True, False, False, False]


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    files = cifar10_files(False)
    mark = tmp_path / "ran"
    content = {"data": cifar_rows(4, 10, 0)[0], "labels": Bomb(mark)}
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps(content, protocol=2)
    write_tree(tmp_path, files)
    with pytest.raises(ExperimentError, match=r"data_batch_3: .*refused"):
        load_files("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda b: b[:-100], "cut short or no pickle"),
        (lambda b: b[:1000], "cut short or no pickle"),
        (lambda b: pickle.dumps([1], protocol=2), "holds no dictionary"),
        (lambda b: pickle.dumps({"labels": [1]}, protocol=2), "lacks 'data'"),
        (lambda b: b"<html>not found</html>", "neither a CIFAR pickle nor"),
        (lambda b: b"", "neither a CIFAR pickle nor"),
    ],
)
def test_bad_cifar_files_are_refused(tmp_path, change, wanted):
    write_tree(tmp_path, cifar10_files(False))
    damage(tmp_path, "cifar-10-batches-py/test_batch", change)
    with pytest.raises(ExperimentError, match=wanted):
        load_files("cifar10", tmp_path)
