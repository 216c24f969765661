"""SVHN, from its .mat files."""

import io
import zlib
from typing import Any

import numpy as np

from optalr.experiments.data.checks import labelled
from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.data.sources import MOST_BYTES, Download, Search, find
from optalr.experiments.errors import ExperimentError


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


def _svhn_part(name: str, content: bytes) -> Split:
    from scipy.io import loadmat, whosmat

    file = f"{name}_32x32.mat"
    try:
        _refuse_mat_bombs(file, content)
        shapes = {key: shape for key, shape, _ in whosmat(io.BytesIO(content))}
        # Read before the arrays are made: a header may say that there are -1 images.
        count = shapes["X"][-1]
        if tuple(shapes["X"]) != (32, 32, 3, count) or count < 1:
            raise ExperimentError(
                f"{file} holds X of shape {shapes['X']}, not (32, 32, 3, N) bytes: it is not the "
                "cropped SVHN."
            )
        if tuple(shapes["y"]) not in ((count, 1), (1, count)):
            raise ExperimentError(
                f"{file} holds y of shape {shapes['y']}, not ({count}, 1): it is not the cropped "
                "SVHN."
            )
        loaded: dict[str, Any] = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = np.asarray(loaded["X"]), np.asarray(loaded["y"]).ravel()
    except ExperimentError:
        raise
    except Exception as error:  # a damaged .mat file can make scipy raise nearly anything
        raise ExperimentError(
            f"{file} is cut short or no SVHN file ({type(error).__name__}): fetch it again."
        ) from None
    if images.shape != (32, 32, 3, count) or images.dtype != np.uint8:
        raise ExperimentError(
            f"{file} holds X of {images.dtype} and shape {images.shape}, not bytes: it is not the "
            "cropped SVHN."
        )
    # The .mat files keep examples on the last axis.
    images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
    if labels.dtype.kind in "iu" and not (labels.min() >= 1 and labels.max() <= 10):
        raise ExperimentError(f"{file}: labels from {labels.min()} to {labels.max()}, not 1 to 10.")
    # SVHN labels the digit 0 as 10.
    return labelled(file, images, labels % 10, num_classes=10)


# The start of a .mat file, before its elements, and the type of a compressed element.
_MAT_HEADER, _MAT_COMPRESSED = 128, 15
_CHUNK = 1 << 24


def _refuse_mat_bombs(name: str, content: bytes) -> None:
    """Raise where a compressed element unpacks to more than SVHN has; no more than a chunk is held.

    Raises:
      ExperimentError: one does.
    """
    order = "<" if content[126:128] == b"IM" else ">"
    place = _MAT_HEADER
    while place + 8 <= len(content):
        kind, size = np.frombuffer(content, f"{order}u4", 2, place).tolist()
        if kind == _MAT_COMPRESSED:
            engine, rest, total = zlib.decompressobj(), content[place + 8 : place + 8 + size], 0
            while rest and not engine.eof:
                total += len(engine.decompress(rest, _CHUNK))
                rest = engine.unconsumed_tail
                if total > MOST_BYTES:
                    raise ExperimentError(
                        f"{name} unpacks to more than the {MOST_BYTES} bytes of SVHN: refused."
                    )
        place += 8 + size
