"""Steps in a row: what is recorded of them, and when a streamed loop ends them."""

import time
from typing import Any, NamedTuple

import numpy as np

from optalr.experiments.processes import Team
from optalr.experiments.training.steps import TrainState

# Often enough for a progress bar.
_REPORT_SECONDS = 1.0
# One segment is at most so many times as long as the one before, whose pace may mislead.
_MOST_GROWTH = 4


class Segment(NamedTuple):
    """Steps that were taken in a row.

    Attributes:
      state: the state after them; the one before has been donated.
      measured: name to one float32 a step.
      seconds: what they took, compilation excluded.
    """

    state: TrainState
    measured: dict[str, np.ndarray]
    seconds: float

    def rows(self, steps_per_epoch: int, before: float) -> list[dict[str, Any]]:
        """Return a row for each step, up to the first loss that is not finite.

        Args:
          steps_per_epoch: tells the epoch of a step.
          before: seconds of the run's earlier steps.
        """
        losses, last = self.measured["loss"], int(self.state.step)
        num_steps = len(losses)
        names = [*self.measured, "step", "epoch", "seconds"]
        steps = np.arange(last - num_steps + 1, last + 1)
        seconds = before + self.seconds / num_steps * np.arange(1, num_steps + 1)
        # Converted to Python numbers a column at a time. One number at a time is slow.
        columns = [
            *(values.tolist() for values in self.measured.values()),
            steps.tolist(),
            (steps / steps_per_epoch).tolist(),
            seconds.tolist(),
        ]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        finite = np.isfinite(losses)
        return rows if finite.all() else rows[: int(np.argmin(finite)) + 1]


class Pace:
    """Ends a segment of steps about once a second; in several processes after the same step.

    These have clocks of their own. So they count steps, as many as the first process took lately in
    a second.

    Args:
      team: the processes that train together.
    """

    def __init__(self, team: Team):
        self._team = team
        self._planned, self._taken = 1, 0
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Begin a segment."""
        self._taken, self._began = 0, time.perf_counter()

    def ends(self) -> bool:
        """Count a step, and return whether it is the segment's last."""
        self._taken += 1
        if self._team.count == 1:
            return self.seconds() > _REPORT_SECONDS
        return self._taken >= self._planned

    def seconds(self) -> float:
        """Return how long the segment has taken."""
        return time.perf_counter() - self._began

    def plan(self) -> None:
        """Agree on the next segment's length, at the end of one."""
        if self._team.count > 1:
            wanted = int(_REPORT_SECONDS * self._taken / self.seconds())
            wanted = min(max(1, wanted), _MOST_GROWTH * self._planned)
            (self._planned,) = self._team.largest(wanted if self._team.writes else 0)
