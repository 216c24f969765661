"""A user's own arrays, from a file of ``numpy.savez``."""

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from optalr.experiments.data.dataset import Raw, Split, Task
from optalr.experiments.data.sources import Search
from optalr.experiments.errors import ExperimentError

_TRAIN, _TEST = ("x", "y"), ("x_test", "y_test")
# Where the system does not say how much memory it has.
_USUAL_MEMORY = 8 << 30


def npz(search: Search, task: Task = "classification") -> Raw:
    """Load ``x`` and ``y``, and ``x_test`` and ``y_test`` where the file has them.

    Args:
      search: ``data.folder`` names the file.
      task: ``classification`` (``y`` holds whole numbers from 0 on) or ``regression``.
    """
    if task not in ("classification", "regression"):
        raise ExperimentError(f"data.task must be classification or regression, got {task!r}.")
    path = Path(search.folder).expanduser()
    if not search.folder or not path.is_file():
        raise ExperimentError("data 'npz' needs data.folder: name a .npz file.")
    arrays = _read(path)
    train, test = (_part(path, arrays, names) for names in (_TRAIN, _TEST))
    if train is None:
        raise ExperimentError(f"{path} has no array 'x' or no 'y': it needs x and y.")
    if task == "regression":
        train, test = _columns(train), test and _columns(test)
        num_numbers = math.prod(train.y.shape[1:])
        return Raw(train, test, task, num_numbers, source=str(path))
    whole = train.y.dtype.kind in "iu" and train.y.size > 0
    num_classes = max(0, int(train.y.max())) + 1 if whole else 1
    # Four axes are images, whose pixels share a mean; anything else is a table of features.
    standardize = "channel" if train.x.ndim == 4 else "feature"
    return Raw(train, test, task, num_classes, standardize, source=str(path))


def _part(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, str]) -> Split | None:
    found = [arrays[name] for name in names if name in arrays]
    if len(found) == 1:
        (missing,) = set(names) - set(arrays)
        raise ExperimentError(f"{path} has no array {missing!r}: it needs {' and '.join(names)}.")
    return Split(*found) if found else None


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in (*_TRAIN, *_TEST) if f"{name}.npy" in archive.namelist()]
            left = _memory() // 2
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    size = archive.getinfo(f"{name}.npy").file_size
                    left -= _announced_bytes(path, name, file, size=size)
            if left < 0:
                raise ExperimentError(f"{path} unpacks to more than half of the memory: refused.")
        # A pickle inside could run code, so object arrays are refused.
        with np.load(path, allow_pickle=False) as loaded:
            return {name: loaded[name] for name in names}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ExperimentError(f"{path} is cut short or no plain .npz file ({error}).") from None
    except NotImplementedError as error:  # a compression that the standard library lacks
        raise ExperimentError(f"{path} is no plain .npz file ({error}).") from None


def _announced_bytes(path: Path, name: str, file: IO[bytes], *, size: int) -> int:
    """Return the size of an array, if what its header says agrees with the size of its file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ExperimentError(f"{path}: {name} is no plain array: the file is no plain .npz file.")
    read = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ExperimentError(f"{path}: {name} holds Python objects: it is no plain .npz file.")
    announced = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or announced != size - file.tell():
        raise ExperimentError(
            f"{path}: the header of {name} announces {announced} bytes of shape {shape}, and there "
            f"are {size - file.tell()}: the file is damaged."
        )
    return announced


def _memory() -> int:
    """Return the bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return _USUAL_MEMORY


def _columns(part: Split) -> Split:
    """Return targets of the shape that a regression model's outputs have."""
    y = part.y.reshape(len(part.y), -1) if part.y.ndim else part.y
    # Overflow leaves infinities, which the check of all data finds.
    with np.errstate(over="ignore"):
        return Split(part.x, y.astype(np.float32) if y.dtype.kind in "biuf" else y)
