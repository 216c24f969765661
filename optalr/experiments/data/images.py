"""MNIST and Fashion-MNIST (idx), CIFAR-10 and CIFAR-100 (pickles and binary)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from optalr.experiments.data.checks import labelled
from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.data.restricted import load_pickle
from optalr.experiments.data.sources import Download, Search, find
from optalr.experiments.errors import ExperimentError

# The third byte of an idx file names the type of its numbers; this one is the unsigned byte.
_IDX_UBYTE = 0x08
_CIFAR_BYTES = 3 * 32 * 32
# The largest file of each: 60000 images of 28 x 28; 10000 and 50000 of CIFAR, with their labels,
# and with their names where the file is a pickle.
_MNIST_MOST = 16 + 60_000 * 28 * 28
_CIFAR10_MOST = 10_000 * (_CIFAR_BYTES + 64)
_CIFAR100_MOST = 50_000 * (_CIFAR_BYTES + 64)


def mnist(search: Search) -> Raw:
    """Load MNIST: 60000 and 10000 digits of 28 x 28, from its idx files, raw or gzipped."""
    # The mirror that PyTorch uses, because the original site often refuses downloads.
    address = "https://ossci-datasets.s3.amazonaws.com/mnist"
    sums = (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    )
    return _idx_data(search, _downloads(address, sums), system="/usr/share/datasets/mnist")


def fashion_mnist(search: Search) -> Raw:
    """Load Fashion-MNIST: 60000 and 10000 garments of 28 x 28, from its idx files."""
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    sums = (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    )
    downloads = _downloads(address, sums)
    return _idx_data(search, downloads, system="/usr/share/datasets/fashion-mnist")


def cifar10(search: Search) -> Raw:
    """Load CIFAR-10: 50000 and 10000 images of 32 x 32 x 3, from pickles or binary files."""
    address = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    downloads = [Download(address, "c58f30108f718f92721af3b95e74349a")]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    wanted = {name: (name, f"{name}.bin") for name in names}
    inside = ("cifar-10-batches-py", "cifar-10-batches-bin")
    files = find(search, wanted, most=_CIFAR10_MOST, inside=inside, downloads=downloads)
    layout = _CifarLayout(key=b"labels", label_bytes=1, byte=0, num_classes=10)
    parts = [_cifar_part(name, content, layout) for name, content in files.items()]
    train = Split(
        np.concatenate([p.x for p in parts[:-1]]), np.concatenate([p.y for p in parts[:-1]])
    )
    return Raw(train, parts[-1], "classification", 10)


def cifar100(search: Search, labels: str = "fine", drop_contradictions: bool = False) -> Raw:
    """Load CIFAR-100: 50000 and 10000 images of 32 x 32 x 3, from pickles or binary files.

    Args:
      search: where the files are.
      labels: ``fine`` (100 classes) or ``coarse`` (20).
      drop_contradictions: leave out training images that occur twice with different labels. There
        are nine such pairs, so 49982 images are left.
    """
    if labels not in _CIFAR100:
        raise ExperimentError(f"data.labels must be fine or coarse, got {labels!r}.")
    address = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    downloads = [Download(address, "eb9058c3a382ffc7106e4002c42a8d85")]
    wanted = {name: (name, f"{name}.bin") for name in ("train", "test")}
    inside = ("cifar-100-python", "cifar-100-binary")
    files = find(search, wanted, most=_CIFAR100_MOST, inside=inside, downloads=downloads)
    layout = _CIFAR100[labels]
    parts = {name: _cifar_part(name, content, layout) for name, content in files.items()}
    train = parts["train"]
    if drop_contradictions:
        train = train.take(np.flatnonzero(~contradictory(train)))
    return Raw(train, parts["test"], "classification", layout.num_classes)


def parse_idx(name: str, content: bytes) -> np.ndarray:
    """Return the array that an idx file of unsigned bytes holds.

    Raises:
      ExperimentError: the format is a different one, or the length is not what the header says.
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
    """Return a mask of the images that occur more than once with different labels."""
    rows = np.ascontiguousarray(part.x.reshape(len(part), -1))
    # One opaque value per image: sorting these is much faster than `unique` over the rows' axis.
    _, group = np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_inverse=True)
    low = np.full(group.max() + 1, np.iinfo(np.int32).max)
    high = np.full(group.max() + 1, -1)
    np.minimum.at(low, group, part.y)
    np.maximum.at(high, group, part.y)
    return (low != high)[group]


_IDX_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def _idx_names(stem: str) -> tuple[str, str]:
    """Return the two names in use, as in train-images-idx3-ubyte and train-images.idx3-ubyte."""
    axes = 3 if stem.endswith("images") else 1
    return f"{stem}-idx{axes}-ubyte", f"{stem}.idx{axes}-ubyte"


def _downloads(address: str, sums: Sequence[str]) -> list[Download]:
    return [
        Download(f"{address}/{_idx_names(stem)[0]}.gz", md5)
        for stem, md5 in zip(_IDX_STEMS, sums, strict=True)
    ]


def _idx_data(search: Search, downloads: Sequence[Download], *, system: str) -> Raw:
    """Read the four idx files, which Debian's packages install into the folder ``system``."""
    wanted = {stem: _idx_names(stem) for stem in _IDX_STEMS}
    files = find(search, wanted, most=_MNIST_MOST, system=(system,), downloads=downloads)
    arrays = {stem: parse_idx(stem, content) for stem, content in files.items()}
    parts = []
    for part in ("train", "t10k"):
        images, labels = arrays[f"{part}-images"], arrays[f"{part}-labels"]
        if images.ndim != 3 or labels.ndim != 1:
            raise ExperimentError(
                f"{part}-images and {part}-labels have {images.ndim} and {labels.ndim} axes, not 3 "
                "and 1: were they exchanged?"
            )
        parts.append(labelled(part, images[..., None], labels, num_classes=10))
    return Raw(parts[0], parts[1], "classification", 10)


class _CifarLayout(NamedTuple):
    """Where a CIFAR file keeps the labels that are wanted.

    Attributes:
      key: their name in a pickle.
      label_bytes: label bytes before each image of a binary file.
      byte: which of these is the label.
      num_classes: how many classes there are.
    """

    key: bytes
    label_bytes: int
    byte: int
    num_classes: int


# A binary record of CIFAR-100 holds the coarse label, the fine label and the image, in this order.
_CIFAR100 = {
    "fine": _CifarLayout(key=b"fine_labels", label_bytes=2, byte=1, num_classes=100),
    "coarse": _CifarLayout(key=b"coarse_labels", label_bytes=2, byte=0, num_classes=20),
}


def _cifar_part(name: str, content: bytes, layout: _CifarLayout) -> Split:
    """Return the examples of a CIFAR pickle or of a CIFAR binary file."""
    # Every pickle of protocol 2 and above starts with this byte, and no CIFAR label is as high.
    if content[:1] == b"\x80":
        return _cifar_pickle(name, content, layout)
    size = layout.label_bytes + _CIFAR_BYTES
    if not content or len(content) % size:
        raise ExperimentError(
            f"{name} has {len(content)} bytes, not a multiple of {size}: it is cut short, or "
            "neither a CIFAR pickle nor a CIFAR binary file."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    images = _channels_last(records[:, layout.label_bytes :])
    return labelled(name, images, records[:, layout.byte], num_classes=layout.num_classes)


def _cifar_pickle(name: str, content: bytes, layout: _CifarLayout) -> Split:
    loaded = load_pickle(name, content)
    images, labels = loaded.get(b"data"), loaded.get(layout.key)
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.shape[1:] != (_CIFAR_BYTES,)
        or not isinstance(labels, (list, np.ndarray))
    ):
        raise ExperimentError(
            f"{name} lacks 'data' of {_CIFAR_BYTES} bytes an image or {layout.key.decode()!r}: it "
            "is not the CIFAR file it should be."
        )
    try:
        labels = np.asarray(labels)
    except ValueError:  # lists of several lengths in the list
        labels = np.zeros((0, 0))
    return labelled(name, _channels_last(images), labels, num_classes=layout.num_classes)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    """Return images from rows of a red, then a green, then a blue plane."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
