"""Data files in the exact formats, made here."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np

from optalr.experiments.configs.config import DataConfig
from optalr.experiments.data import load


def load_files(name, folder, **options):
    """Load what lies in ``folder``, all of its training examples."""
    return load(DataConfig(name=name, folder=str(folder), validation_fraction=0.0, **options))


def idx_bytes(array):
    """Return an idx file of unsigned bytes."""
    header = b"\0\0\x08" + bytes([array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


_RNG = np.random.default_rng(0)
MNIST = {
    "train-images-idx3-ubyte": _RNG.integers(0, 256, (40, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": np.arange(40, dtype=np.uint8) % 10,
    "t10k-images-idx3-ubyte": _RNG.integers(0, 256, (10, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
}


def write_mnist(folder, style="-", zipped=False):
    """Write the four files of ``MNIST``, named in one style or the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in MNIST.items():
        name = name.replace("-idx", f"{style}idx")
        content = idx_bytes(array)
        if zipped:
            name, content = name + ".gz", gzip.compress(content)
        (folder / name).write_bytes(content)
    return folder


def cifar_rows(count, classes, seed):
    """Return images as CIFAR's files hold them, a row each, and their labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, classes, count).tolist()


def cifar10_files(binary):
    """Return name to contents of CIFAR-10's files, four images each."""
    files = {}
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows, labels = cifar_rows(4, 10, i)
        if binary:
            column = np.array(labels, np.uint8)[:, None]
            files[f"cifar-10-batches-bin/{name}.bin"] = np.hstack([column, rows]).tobytes()
        else:
            content = {"data": rows, "labels": labels, "filenames": ["a.png"] * 4}
            files[f"cifar-10-batches-py/{name}"] = pickle.dumps(content, protocol=2)
    return files


def cifar100_files(binary, count=6):
    """Return CIFAR-100's files, with a pair of contradictory images, and both lists of labels."""
    rows, fine = cifar_rows(count, 100, 0)
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


def write_svhn(folder, parts=("train", "test", "extra")):
    """Write SVHN's .mat files, 12 digits each."""
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(parts):
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (32, 32, 3, 12), np.uint8)
        labels = np.arange(12, dtype=np.uint8)[:, None] % 10 + 1
        savemat(folder / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    return folder


def write_tree(folder, files):
    """Write name to contents into a folder and its subfolders."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files):
    """Pack name to contents into a tar archive."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def damage(folder, name, change):
    """Replace a file's contents by what ``change`` makes of them."""
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


class Bomb:
    """Runs a command when it is unpickled by the ordinary unpickler."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)
