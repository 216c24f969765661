"""A user's own arrays, from a file of ``numpy.savez``."""

import zipfile
from pathlib import Path

import numpy as np

from optalr.experiments.data.dataset import Raw, Split, Task
from optalr.experiments.data.sources import Search
from optalr.experiments.errors import ExperimentError


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
    train, test = _read_parts(path)
    if task == "regression":
        return Raw(_columns(train), test and _columns(test), task, _columns(train).y.shape[1])
    if not np.issubdtype(train.y.dtype, np.integer) or train.y.min() < 0:
        raise ExperimentError(f"{path}: y must be whole numbers from 0 on for classification.")
    train = Split(train.x, train.y.astype(np.int32))
    test = test and Split(test.x, test.y.astype(np.int32))
    # Four axes are images, whose pixels share a mean; anything else is a table of features.
    standardize = "channel" if train.x.ndim == 4 else "feature"
    return Raw(train, test, task, int(train.y.max()) + 1, standardize)


def _read_parts(path: Path) -> tuple[Split, Split | None]:
    try:
        # A pickle inside could run code, so object arrays are refused.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        train = Split(arrays["x"], arrays["y"])
    except KeyError as error:
        raise ExperimentError(f"{path} has no array {error}: it needs x and y.") from None
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ExperimentError(f"{path} is cut short or no plain .npz file ({error}).") from None
    if len(train.x) != len(train.y):
        raise ExperimentError(f"{path} has {len(train.x)} x but {len(train.y)} y.")
    return train, Split(arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None


def _columns(part: Split) -> Split:
    """Return targets of the shape that a regression model's outputs have."""
    return Split(part.x, part.y.reshape(len(part), -1).astype(np.float32))
