"""What every data set must be, whatever its format: the last step of every loader."""

import numpy as np

from optalr.experiments.data.dataset import Raw, Split
from optalr.experiments.errors import ExperimentError

# Targets and whole inputs reach the device as int32, other inputs as float32.
_INTEGERS = np.iinfo(np.int32)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
# More classes than this are numbers taken for classes, unless there are as many examples.
_MOST_CLASSES = 65_536


def labelled(name: str, images: np.ndarray, labels: np.ndarray, *, num_classes: int) -> Split:
    """Return images with their labels; raise if they cannot belong together."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ExperimentError(
            f"{name}: labels are of {labels.dtype} and shape {labels.shape}, not one whole number "
            "an image."
        )
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


def checked(name: str, raw: Raw) -> Raw:
    """Return what a loader found, with class labels as int32, if a model can learn from it.

    Args:
      name: the data's name.
      raw: what the loader found.

    Raises:
      ExperimentError: something cannot be learned from. The message names file, field and value.
    """
    where = raw.source or f"data {name!r}"
    if raw.task != "regression" and raw.num_classes > max(_MOST_CLASSES, len(raw.train)):
        raise ExperimentError(
            f"{where}: y goes up to {raw.num_classes - 1} with {len(raw.train)} examples, so it "
            "does not number classes: number them from 0 on, or set data.task to regression."
        )
    train = _checked(raw.train, raw, where=where, suffix="")
    if raw.test is None:
        return raw._replace(train=train)
    test = _checked(raw.test, raw, where=where, suffix="_test")
    for field, one, other in (("x", train.x, test.x), ("y", train.y, test.y)):
        if one.shape[1:] != other.shape[1:]:
            raise ExperimentError(
                f"{where}: {field}_test has examples of shape {other.shape[1:]} and {field} of "
                f"shape {one.shape[1:]}: they must agree."
            )
    return raw._replace(train=train, test=test)


def _checked(part: Split, raw: Raw, *, where: str, suffix: str) -> Split:
    x, y = f"{where}: x{suffix}", f"{where}: y{suffix}"
    if np.ndim(part.x) < 1 or np.ndim(part.y) < 1 or len(part.x) != len(part.y):
        raise ExperimentError(
            f"{where}: x{suffix} has shape {np.shape(part.x)} and y{suffix} {np.shape(part.y)}: "
            "there must be as many of both."
        )
    if part.x.size == 0 or part.y.size == 0:
        raise ExperimentError(f"{where}: x{suffix} or y{suffix} is empty.")
    _check_numbers(x, part.x)
    if raw.task == "regression":
        _check_numbers(y, part.y)
        if part.y.ndim != 2:
            raise ExperimentError(f"{y} has shape {part.y.shape}, not one row an example.")
        return part
    if part.y.dtype.kind not in "iu":
        raise ExperimentError(f"{y} must be whole numbers from 0 on, and is of {part.y.dtype}.")
    wanted = part.x.shape if raw.task == "language" else part.y.shape[:1]
    if part.y.shape != wanted:
        raise ExperimentError(f"{y} has shape {part.y.shape}, not {wanted}: a number an example.")
    for label, values in ((y, part.y), (x, part.x if raw.task == "language" else part.y)):
        _check_range(label, values, raw.num_classes)
    return Split(part.x, part.y.astype(np.int32))


def _check_numbers(label: str, values: np.ndarray) -> None:
    if values.dtype.kind not in "biuf":
        raise ExperimentError(f"{label} must be numbers, and is of {values.dtype}.")
    if values.dtype.kind == "b":
        return
    # NaN spreads into both, and is in no interval.
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not -_LARGEST_FLOAT <= float(low) <= float(high) <= _LARGEST_FLOAT:
            bad = ~(np.abs(values) <= _LARGEST_FLOAT)
            raise ExperimentError(f"{_place(label, values, bad)}, not a finite float32.")
    elif int(low) < _INTEGERS.min or int(high) > _INTEGERS.max:
        bad = (values < _INTEGERS.min) | (values > _INTEGERS.max)
        raise ExperimentError(f"{_place(label, values, bad)}, more than 32 bits hold.")


def _check_range(label: str, values: np.ndarray, num_classes: int) -> None:
    if int(values.min()) < 0 or int(values.max()) >= num_classes:
        bad = (values < 0) | (values >= num_classes)
        raise ExperimentError(f"{_place(label, values, bad)}, not from 0 to {num_classes - 1}.")


def _place(label: str, values: np.ndarray, bad: np.ndarray) -> str:
    """Return where the first bad value stands, and the value."""
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{label}[{', '.join(map(str, place))}] is {values[place]}"
