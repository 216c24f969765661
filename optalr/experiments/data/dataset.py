"""What a loader returns, and how examples are held out."""

import dataclasses
import functools
import hashlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.errors import ExperimentError

Task = Literal["classification", "regression", "language"]


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples ``x`` and as many targets ``y``."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: np.ndarray) -> "Split":
        """Return the examples at ``indices``."""
        return Split(self.x[indices], self.y[indices])


class Raw(NamedTuple):
    """What a loader returns: examples, a test set if the data has one, and the task.

    Attributes:
      train: the examples; images are ``(N, height, width, channels)``, uint8 or float32.
      test: the data's own test set, or None.
      task: what to learn; it decides the loss.
      num_classes: the number of classes, of symbols, or of numbers to predict.
      standardize: ``channel`` (one mean and deviation per channel), ``feature`` (one per number) or
        ``none``.
      note: what a user must know about the data.
      source: the file or folder that it comes from, for messages.
    """

    train: Split
    test: Split | None
    task: Task
    num_classes: int
    standardize: Literal["channel", "feature", "unit", "none"] = "channel"
    note: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, and the map that standardizes them by the training examples.

    Attributes:
      name: the data's name.
      train: examples to learn from.
      validation: examples for tuning and switching; may be empty.
      test: examples for the report.
      task: what to learn; it decides the loss.
      num_classes: the number of classes, of symbols, or of numbers to predict.
      mean: what is subtracted, of the rank of a batch; None leaves the numbers alone.
      scale: what the difference is multiplied by, of the same shape.
      note: what a user must know about the data.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    task: Task
    num_classes: int
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None
    note: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of all examples and targets of all splits."""
        total = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for array in (part.x, part.y):
                total.update(f"{array.dtype.str}{array.shape}".encode())
                total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()[:16]

    def prepare(self, x: jax.Array) -> jax.Array:
        """Return a batch as a model takes it: float32, standardized (text stays whole numbers)."""
        if self.mean is None or self.scale is None:
            return x
        shape = (1, *x.shape[1:])
        mean, scale = np.broadcast_to(self.mean, shape), np.broadcast_to(self.scale, shape)
        return (x.astype(jnp.float32) - jnp.asarray(mean)) * jnp.asarray(scale)


def split(
    name: str,
    raw: Raw,
    *,
    test_fraction: float,
    validation_fraction: float,
    split_seed: int,
    limit: int = 0,
    fraction: float = 1.0,
) -> Dataset:
    """Hold out validation examples, and test examples where the data has none, and standardize.

    Args:
      name: the data's name.
      raw: what a loader returned.
      test_fraction: part of all examples to test on, in [0, 1), where the data has no test set.
      validation_fraction: part of what is then left to validate on, in [0, 1).
      split_seed: decides which examples are held out, and nothing else.
      limit: at most so many training examples; 0 keeps all.
      fraction: part of the training examples to keep, in (0, 1].

    Raises:
      ExperimentError: nothing is left to learn from or to test on.
    """
    order = np.random.default_rng(split_seed).permutation(len(raw.train))
    if raw.test is None:
        num_test = round(test_fraction * len(order))
        test, order = raw.train.take(np.sort(order[:num_test])), order[num_test:]
    else:
        test = raw.test
    num_validation = round(validation_fraction * len(order))
    validation = raw.train.take(np.sort(order[:num_validation]))
    # The cut comes last, so that smaller training sets are tested on the same examples.
    kept = order[num_validation:]
    kept = kept[: max(1, round(fraction * len(kept)))]
    # Sorted, so that examples stay in the order of their file.
    train = raw.train.take(np.sort(kept[:limit] if limit else kept))
    if not len(train) or not len(test):
        raise ExperimentError(
            f"data {name!r}: {len(train)} examples to train on and {len(test)} to test on; choose "
            "data.test_fraction and data.validation_fraction so that both are left."
        )
    mean, scale = _moments(train.x, raw.standardize)
    return Dataset(name, train, validation, test, raw.task, raw.num_classes, mean, scale, raw.note)


def _moments(x: np.ndarray, how: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the ``mean`` and the ``scale``, one over the deviation, of a ``Dataset``."""
    if how == "none":
        return None, None
    if how == "unit":
        largest = np.iinfo(x.dtype).max if x.dtype.kind in "iu" else np.abs(x).max(initial=0.0)
        one = np.ones((1,) * x.ndim, np.float32)
        return 0 * one, one / np.float32(largest or 1)
    axes = (0,) if how == "feature" else tuple(range(x.ndim - 1))
    # In chunks: a float64 copy of a whole image set would take eight times its memory.
    total, square, count = 0.0, 0.0, 0
    for start in range(0, len(x), 4096):
        part = x[start : start + 4096].astype(np.float64)
        total = total + part.sum(axes, keepdims=True)
        square = square + (part**2).sum(axes, keepdims=True)
        count += part.size // int(np.prod([n for i, n in enumerate(x.shape) if i not in axes]))
    mean = np.asarray(total / count)
    deviation = np.sqrt(np.maximum(np.asarray(square / count) - mean**2, 0.0))
    # A feature that never changes says nothing; dividing by its rounding errors would blow it up.
    scale = np.where(deviation > 1e-8 * (1.0 + np.abs(mean)), 1.0 / np.maximum(deviation, 1e-30), 0)
    return mean.astype(np.float32), scale.astype(np.float32)
