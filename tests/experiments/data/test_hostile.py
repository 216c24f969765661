"""Files that announce more than they hold, and files that hold what no model can learn from."""

import gzip
import io
import pickle
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from optalr.experiments.data.restricted import load_pickle
from optalr.experiments.errors import ExperimentError
from tests.experiments.data.files import (
    cifar10_files,
    damage,
    idx_bytes,
    load_files,
    write_mnist,
    write_tar,
    write_tree,
)

ZEROS = bytes(1 << 20)


@pytest.fixture
def memory():
    """Fail where a test takes more memory than any of these files may."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x1f.",  # a memo of half a gigabyte of places
        b"\x80\x04B\xff\xff\xff\x7f.",  # bytes that are not there
        b"\x80\x02cnumpy\nndarray\n(J\x00\xca\x9a;tR.",  # an array of 10^9 numbers
    ],
)
def test_a_pickle_that_asks_for_memory_is_refused(content, memory):
    with pytest.raises(ExperimentError, match=r"refused|cut short|no dictionary"):
        load_pickle("batch", content)


def test_a_pickle_whose_array_lies_is_refused(memory):
    honest = pickle.dumps({"data": np.zeros((3, 4), np.uint8)}, protocol=2)
    assert load_pickle("batch", honest)[b"data"].shape == (3, 4)
    # Python 2 wrote names as bytes.
    old = honest.replace(b"X\x02\x00\x00\x00u1", b"U\x02u1")
    assert old != honest
    assert load_pickle("batch", old)[b"data"].dtype == np.uint8
    lying = honest.replace(b"K\x03K\x04\x86", b"J\xff\xff\xff\x7fK\x04\x86")
    with pytest.raises(ExperimentError, match="do not agree: it is damaged"):
        load_pickle("batch", lying)
    objects = pickle.dumps({"data": np.array([None])}, protocol=2)
    with pytest.raises(ExperimentError, match="not of numbers"):
        load_pickle("batch", objects)


def test_a_gzip_file_that_unpacks_to_more_than_its_format_needs_is_refused(tmp_path, memory):
    folder = write_mnist(tmp_path / "files", zipped=True)
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb") as file:
        for _ in range(60):
            file.write(ZEROS)
    with pytest.raises(ExperimentError, match="unpacks to more than the 47040016 bytes"):
        load_files("mnist", folder)
    (folder / "train-images-idx3-ubyte.gz").unlink()
    with open(folder / "train-images-idx3-ubyte", "wb") as file:
        file.truncate(4 << 30)  # takes no room on the disk
    with pytest.raises(ExperimentError, match=r"has 4294967296 bytes, and the right file at most"):
        load_files("mnist", folder)


def test_an_archive_whose_headers_ask_for_memory_is_refused(tmp_path, memory):
    path = tmp_path / "cifar-10-python.tar.gz"
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 4 << 30
    with gzip.open(path, "wb") as file:
        file.write(header.tobuf() + ZEROS)
    with pytest.raises(ExperimentError, match="headers that no tar archive needs"):
        load_files("cifar10", tmp_path)


def test_an_archive_that_holds_too_much_is_refused(tmp_path, memory):
    files = cifar10_files(False)
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    member.size = 1 << 34
    with gzip.open(path, "wb") as file:
        file.write(member.tobuf() + ZEROS)
    with pytest.raises(ExperimentError, match="holds more than the"):
        load_files("cifar10", tmp_path)


def _write_npz(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def test_a_header_that_lies_is_refused(tmp_path, memory):
    def array(shape):
        buffer = io.BytesIO()
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        return buffer.getvalue() + bytes(80)

    path = tmp_path / "mine.npz"
    _write_npz(path, x=array((10**12,)), y=array((10,)))
    with pytest.raises(ExperimentError, match=r"header of x announces 8000000000000 bytes"):
        load_files("npz", path)
    _write_npz(path, x=array((10,)), y=array((-1, -10)))
    with pytest.raises(ExperimentError, match=r"header of y announces"):
        load_files("npz", path)


X, Y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3


@pytest.mark.parametrize(
    ("arrays", "wanted"),
    [
        ({"y": Y + 0.5}, r"mine\.npz: y must be whole numbers"),
        ({"y": Y - 7}, r"y\[0\] is -7, not from 0 to"),
        ({"y": np.where(Y == 2, 10**9, Y)}, "y goes up to 1000000000 with 30 examples"),
        ({"y": np.where(Y == 2, 2**40, Y)}, "y goes up to 1099511627776"),
        ({"y": np.stack([Y, Y], 1)}, r"y has shape \(30, 2\), not \(30,\)"),
        ({"y": Y[:7]}, r"x has shape \(30, 4\) and y \(7,\)"),
        ({"y": Y.astype(str)}, "y must be whole numbers from 0 on, and is of <U21"),
        ({"y": np.int64(3)}, r"y \(\)"),
        ({"x": X.astype(str)}, "x must be numbers, and is of <U32"),
        ({"x": X + 1j}, "x must be numbers, and is of complex128"),
        ({"x": np.where(X > 2, np.nan, X)}, r"x\[\d+, \d\] is nan, not a finite float32"),
        ({"x": np.where(X > 2, np.inf, X)}, r"x\[\d+, \d\] is inf, not a finite float32"),
        ({"x": X * 1e300}, r"not a finite float32"),
        ({"x": np.full((30, 4), 2**40)}, r"x\[0, 0\] is 1099511627776, more than 32 bits"),
        ({"x": X[:0], "y": Y[:0]}, "x or y is empty"),
        ({"x_test": X[:, :3], "y_test": Y}, r"x_test has examples of shape \(3,\)"),
        ({"x_test": X, "y_test": Y + 3}, r"y_test\[0\] is 3, not from 0 to 2"),
        ({"x_test": X}, "has no array 'y_test': it needs x_test and y_test"),
        ({"y_test": Y}, "has no array 'x_test'"),
    ],
)
def test_what_no_model_can_learn_is_refused(tmp_path, arrays, wanted):
    path = tmp_path / "mine.npz"
    np.savez(path, **{"x": X, "y": Y, **arrays})
    with pytest.raises(ExperimentError, match=wanted) as caught:
        load_files("npz", path)
    assert "mine.npz" in str(caught.value)


@pytest.mark.parametrize("y", [np.full(30, np.nan), np.full(30, 1e300), np.full(30, "a")])
def test_targets_of_a_regression_are_finite_numbers(tmp_path, y):
    path = tmp_path / "mine.npz"
    np.savez(path, x=X, y=y)
    with pytest.raises(ExperimentError, match=r"mine\.npz: y(\[0, 0\] is| must be numbers)"):
        load_files("npz", path, task="regression")


def test_labels_of_a_pickle_are_whole_numbers_one_an_image(tmp_path):
    for labels in ([0.5] * 4, [[1, 2]] * 4, [[1], [1, 2], [3], [4]], [2**70] * 4):
        write_tree(tmp_path, cifar10_files(False))

        def change(content, labels=labels):
            return pickle.dumps({**pickle.loads(content), "labels": labels}, protocol=2)

        damage(tmp_path, "cifar-10-batches-py/test_batch", change)
        with pytest.raises(ExperimentError, match="test_batch: labels are of"):
            load_files("cifar10", tmp_path)


def test_a_test_set_of_another_shape_is_refused(tmp_path):
    folder = write_mnist(tmp_path / "files")
    damage(
        folder,
        "t10k-images-idx3-ubyte",
        lambda content: idx_bytes(np.zeros((10, 28, 27), np.uint8)),
    )
    with pytest.raises(ExperimentError, match=r"x_test has examples of shape \(28, 27, 1\)"):
        load_files("mnist", folder)


def _write_svhn(folder, part, **changes):
    from scipy.io import savemat

    pixels = np.zeros((32, 32, 3, 12), np.uint8)
    labels = np.arange(12, dtype=np.uint8)[:, None] % 10 + 1
    savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": labels, **changes})


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"y": np.arange(12.0)[:, None] % 10 + 1}, "labels are of float64"),
        ({"y": np.full((12, 1), 17, np.uint8)}, "labels from 17 to 17, not 1 to 10"),
        ({"y": np.ones((6, 2), np.uint8)}, r"y of shape \(6, 2\), not \(12, 1\)"),
    ],
)
def test_labels_of_a_mat_file(tmp_path, changes, wanted):
    _write_svhn(tmp_path, "train")
    _write_svhn(tmp_path, "test", **changes)
    with pytest.raises(ExperimentError, match=wanted):
        load_files("svhn", tmp_path)


def test_negative_dimensions_of_a_mat_file(tmp_path):
    _write_svhn(tmp_path, "train")
    _write_svhn(tmp_path, "test")
    shape = np.array([32, 32, 3, 12], "<i4").tobytes()
    lying = np.array([32, 32, 3, -1], "<i4").tobytes()
    damage(tmp_path, "test_32x32.mat", lambda content: content.replace(shape, lying))
    with pytest.raises(ExperimentError, match=r"X of shape .*-1.*: it is not the cropped SVHN"):
        load_files("svhn", tmp_path)


@pytest.mark.parametrize("pattern", ["/etc/*.txt", "../*.txt", "", "**x"])
def test_patterns_of_texts_stay_in_their_folder(tmp_path, pattern):
    (tmp_path / "a.txt").write_text("hello world. " * 40)
    with pytest.raises(ExperimentError, match=r"data\.pattern|holds no"):
        load_files("text", tmp_path, pattern=pattern)
