"""MNIST and Fashion-MNIST (idx), CIFAR-10 and CIFAR-100 (pickles and binary), SVHN (.mat)."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.data.restricted import load_pickle
from optalr.experiments.data.sources import Download, Search, find
from optalr.experiments.errors import ExperimentError

_IDX_UBYTE = 0x08


def mnist(search: Search) -> Raw:
    """Load MNIST: 60000 and 10000 digits of 28 x 28, from its idx files, raw or gzipped."""
    address = "https://ossci-datasets.s3.amazonaws.com/mnist"
    sums = (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    return _idx_data(search, address, sums, ("/usr/share/datasets/mnist",))


def fashion_mnist(search: Search) -> Raw:
    """Load Fashion-MNIST: 60000 and 10000 garments of 28 x 28, from its idx files."""
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    sums = (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    return _idx_data(search, address, sums, ("/usr/share/datasets/fashion-mnist",))


def cifar10(search: Search) -> Raw:
    """Load CIFAR-10: 50000 and 10000 images of 32 x 32 x 3, from pickles or binary files."""
    address = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    downloads = [Download(address, "c58f30108f718f92721af3b95e74349a")]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    wanted = {name: (name, f"{name}.bin") for name in names}
    inside = ("cifar-10-batches-py", "cifar-10-batches-bin")
    files = find(search, wanted, inside=inside, downloads=downloads)
    parts = [_cifar_part(name, content, 1, b"labels", 10) for name, content in files.items()]
    train = Split(
        np.concatenate([p.x for p in parts[:-1]]), np.concatenate([p.y for p in parts[:-1]])
    )
    return Raw(train, parts[-1], "classification", 10)


def cifar100(search: Search, labels: str = "fine", drop_contradictions: bool = False) -> Raw:
    """Load CIFAR-100: 50000 and 10000 images of 32 x 32 x 3, from pickles or binary files.

    Args:
      search: where the files are.
      labels: ``fine`` (100 classes) or ``coarse`` (20).
      drop_contradictions: leave out training images that occur twice with different labels (nine
        pairs, so that 49982 images are left).
    """
    if labels not in ("fine", "coarse"):
        raise ExperimentError(f"data.labels must be fine or coarse, got {labels!r}.")
    address = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    downloads = [Download(address, "eb9058c3a382ffc7106e4002c42a8d85")]
    wanted = {name: (name, f"{name}.bin") for name in ("train", "test")}
    inside = ("cifar-100-python", "cifar-100-binary")
    files = find(search, wanted, inside=inside, downloads=downloads)
    num_classes = 100 if labels == "fine" else 20
    # A binary record is coarse label, fine label, image.
    byte = 1 if labels == "fine" else 0
    key = f"{labels}_labels".encode()
    parts = {
        name: _cifar_part(name, content, 2, key, num_classes, byte)
        for name, content in files.items()
    }
    train = parts["train"]
    if drop_contradictions:
        train = train.take(np.flatnonzero(~contradictory(train)))
    return Raw(train, parts["test"], "classification", num_classes)


def svhn(search: Search, extra: bool = False) -> Raw:
    """Load SVHN, cropped: 73257 and 26032 digits of 32 x 32 x 3, from its .mat files.

    Args:
      search: where the files are.
      extra: add the 531131 easier examples of ``extra_32x32.mat`` to the training set.
    """
    sums = {
        "train": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test": "eb5a983be6a315427106f1b164d9cef3",
        "extra": "a93ce644f1a588dc4d68dda5feec44a7",
    }
    names = ("train", "test", "extra") if extra else ("train", "test")
    address = "http://ufldl.stanford.edu/housenumbers"
    downloads = [Download(f"{address}/{name}_32x32.mat", sums[name]) for name in names]
    wanted = {name: (f"{name}_32x32.mat",) for name in names}
    parts = {k: _svhn_part(k, v) for k, v in find(search, wanted, downloads=downloads).items()}
    train = parts["train"]
    if extra:
        more = parts["extra"]
        train = Split(np.concatenate([train.x, more.x]), np.concatenate([train.y, more.y]))
    return Raw(train, parts["test"], "classification", 10)


def parse_idx(name: str, content: bytes) -> np.ndarray:
    """Return the array of an idx file of unsigned bytes.

    Raises:
      ExperimentError: another format, or another length than its header says.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _IDX_UBYTE:
        raise ExperimentError(f"{name} is no idx file of bytes: is it the right file?")
    num_axes = content[3]
    start = 4 + 4 * num_axes
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist()) if len(content) >= start else ()
    if len(shape) != num_axes or len(content) - start != math.prod(shape):
        raise ExperimentError(
            f"{name} has {len(content)} bytes, which is not what its header announces "
            f"({shape}): it is cut short or damaged; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def contradictory(part: Split) -> np.ndarray:
    """Mark the images that occur more than once with different labels."""
    rows = np.ascontiguousarray(part.x.reshape(len(part), -1))
    _, group = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_inverse=True)
    low = np.full(group.max() + 1, np.iinfo(np.int32).max)
    high = np.full(group.max() + 1, -1)
    np.minimum.at(low, group, part.y)
    np.maximum.at(high, group, part.y)
    return (low != high)[group]


def _idx_data(search: Search, address: str, sums: Sequence[str], system: Sequence[str]) -> Raw:
    stems = ("train-images", "train-labels", "t10k-images", "t10k-labels")
    wanted, downloads = {}, []
    for stem, md5 in zip(stems, sums, strict=True):
        axes = 3 if stem.endswith("images") else 1
        # Both styles are about: train-images-idx3-ubyte and train-images.idx3-ubyte.
        wanted[stem] = (f"{stem}-idx{axes}-ubyte", f"{stem}.idx{axes}-ubyte")
        downloads.append(Download(f"{address}/{stem}-idx{axes}-ubyte.gz", md5))
    files = find(search, wanted, system=system, downloads=downloads)
    arrays = {stem: parse_idx(stem, content) for stem, content in files.items()}
    parts = []
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if images.ndim != 3 or labels.ndim != 1:
            raise ExperimentError(
                f"{part}-images and {part}-labels have {images.ndim} and {labels.ndim} axes, not 3 "
                "and 1: were they exchanged?"
            )
        parts.append(_split(part, images[..., None], labels, 10))
    return Raw(parts[0], parts[1], "classification", 10)


def _cifar_part(
    name: str, content: bytes, num_labels: int, key: bytes, num_classes: int, byte: int = 0
) -> Split:
    """Return the images of a pickle, or of a binary file with ``num_labels`` bytes before each."""
    if content[:1] == b"\x80":
        return _cifar_pickle(name, content, key, num_classes)
    size = num_labels + 3072
    if not content or len(content) % size:
        raise ExperimentError(
            f"{name} has {len(content)} bytes, not a multiple of {size}: it is cut short, or "
            "neither a CIFAR pickle nor a CIFAR binary file."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _split(name, _channels_last(records[:, num_labels:]), records[:, byte], num_classes)


def _cifar_pickle(name: str, content: bytes, key: bytes, num_classes: int) -> Split:
    loaded = load_pickle(name, content)
    images, labels = loaded.get(b"data"), loaded.get(key)
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (3072,)
        or not isinstance(labels, (list, np.ndarray))
    ):
        raise ExperimentError(
            f"{name} lacks 'data' of 3072 bytes an image or {key.decode()!r}: it is not the CIFAR "
            "file it should be."
        )
    return _split(name, _channels_last(images), np.asarray(labels), num_classes)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _svhn_part(name: str, content: bytes) -> Split:
    from scipy.io import loadmat

    try:
        loaded: dict[str, Any] = loadmat(io.BytesIO(content))
        images, labels = np.asarray(loaded["X"]), np.asarray(loaded["y"]).ravel()
    except Exception as error:
        raise ExperimentError(
            f"{name}_32x32.mat is cut short or no SVHN file ({type(error).__name__}): fetch it "
            "again."
        ) from None
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise ExperimentError(
            f"{name}_32x32.mat holds X of shape {images.shape}, not (32, 32, 3, N) bytes: it "
            "is not the cropped SVHN."
        )
    # SVHN calls the digit 0 ten.
    return _split(name, np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels % 10, 10)


def _split(name: str, images: np.ndarray, labels: np.ndarray, num_classes: int) -> Split:
    if len(images) != len(labels):
        raise ExperimentError(
            f"{name}: {len(images)} images but {len(labels)} labels; the files do not belong "
            "together."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ExperimentError(
            f"{name}: labels from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}."
        )
    return Split(images, labels.astype(np.int32))
