"""What a curve of losses tells: where it ends, how low it comes, when it reaches a loss."""

from typing import Any, NamedTuple

import numpy as np

# The columns of a curve.
STEP, TRAIN, TRAIN_SCORE, VALIDATION, VALIDATION_SCORE, TEST, TEST_SCORE = range(7)


class Run(NamedTuple):
    """A reported run.

    Attributes:
      curve: a row for each point, the start included, with the columns above.
      seconds: what all its steps took.
      numbers: of a tuned method, those that were chosen.
      made_by: code, jax and machine, as far as they are known.
      load: processes that wanted a core when it ended; NaN if unknown.
    """

    curve: np.ndarray
    seconds: float
    numbers: dict[str, float]
    made_by: dict[str, str]
    load: float

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Run":
        """Return what a stored record says of a run."""
        made_by = {name: record.get(name, "unknown") for name in ("code", "jax", "machine")}
        curve = np.asarray(record["curve"], float)
        load = record.get("load", np.nan)
        return cls(curve, record["seconds"], record["numbers"], made_by, load)

    def losses(self, column: int) -> np.ndarray:
        """Return a column of losses, with infinity for what is no number."""
        values = self.curve[:, column]
        return np.where(np.isfinite(values), values, np.inf)

    def final(self, column: int) -> float:
        """Return the last loss of a column; infinity where training broke off."""
        return float(self.losses(column)[-1]) if self.ended else np.inf

    def lowest(self, column: int) -> float:
        """Return the lowest loss of a column on the way."""
        return float(self.losses(column).min())

    @property
    def error(self) -> float:
        """The final test score with a minus, so that less is better as with losses."""
        score = self.curve[-1, TEST_SCORE]
        return float(-score) if self.ended and np.isfinite(score) else np.inf

    @property
    def ended(self) -> bool:
        """Whether the run came to its end: it breaks off at a loss that is no number."""
        return bool(np.isfinite(self.curve[-1, TRAIN]))

    def share_until(self, column: int, target: float, total_steps: float) -> float:
        """Return the share of a run's steps until a loss is reached; infinity for never."""
        return crossing(self.curve[:, STEP], self.losses(column), target) / total_steps


def crossing(steps: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Return the step at which ``losses`` first reach ``target``, on straight lines between points.

    Infinity stands for never.
    """
    reached = np.flatnonzero(losses <= target)
    if not len(reached):
        return np.inf
    at = reached[0]
    if at == 0 or not np.isfinite(losses[at - 1]):
        return float(steps[at])
    part = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    return float(steps[at - 1] + part * (steps[at] - steps[at - 1]))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error; 0 where there is no telling."""
    mean = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(mean):
        return mean, 0.0
    return mean, float(np.std(values, ddof=1) / np.sqrt(len(values)))
