"""A copy of a state's clocks on the host, which runs ahead of the device.

Clocks count updates, so the host knows what the next update has to do before the device has begun
with the last one. What the host cannot know (a batch that was not usable, a plateau of the
validation loss) makes the copy differ. So it is compared with the device's own clocks every now and
then, with what these were some updates ago, which waits for nothing.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.clocks import ASK, MEASURE, PROBE, REFRESH, REPAIR
from optalr.programs.survey import Survey

# What each update may do if one of them has to do it: a program more would cost more to compile
# than what it would save. Work that is not due is computed and not used.
_TOGETHER = {
    MEASURE: MEASURE | PROBE,
    REFRESH: MEASURE | PROBE | REFRESH,
    PROBE: PROBE,
    REPAIR: MEASURE | PROBE | REFRESH | REPAIR,
}

# What all states of a run are told in one update, clock by clock.
Told = tuple[int, ...]


class _Sent(NamedTuple):
    """Clocks on their way to the host."""

    update: int  # of so many updates they are the state
    report: list[jax.Array]
    clocks: list[Any]  # the copy by then


class Mirror:
    """The clocks of one run, on the host.

    Args:
      known: where the state keeps its clocks.
      leaves: the state's leaves; those of clocks are read here, once, which waits for the device.
      every: updates between two comparisons with the device, >= 2.
    """

    def __init__(self, known: Survey, leaves: Sequence[Any], every: int):
        self._survey = known
        self._lag = max(1, every // 2)
        self._updates = 0
        self._sent: _Sent | None = None
        self._history: collections.deque[Told] = collections.deque(maxlen=self._lag)
        self._clocks = self._read(leaves)

    def next_told(self) -> Told:
        """Return what the next update is told."""
        told: list[int] = []
        open_places: list[int] = []
        level = 0
        for i, (place, clock) in enumerate(zip(self._survey.places, self._clocks, strict=True)):
            told.append(ASK)
            if place.asks:
                continue
            told[i] = 0
            if not self._survey.is_open(place, told):
                continue
            if hasattr(clock, "opens"):
                told[i] = int(clock.needs())
            else:
                open_places.append(i)
                level |= int(clock.needs())
        for bit, together in _TOGETHER.items():
            level |= together if level & bit else 0
        for i in open_places:
            told[i] = level
        return tuple(told)

    def advance(self, told: Told, leaves: Sequence[jax.Array]) -> None:
        """Take note of an update: what it was told, and the leaves of the state that it left."""
        self._clocks = self._after(self._clocks, told)
        self._updates += 1
        self._history.append(told)
        if not all(getattr(self._clocks[i], "is_certain", True) for i in self._running(told)):
            self._sent = None
            self._clocks = self._read(leaves)
        elif self._sent is None:
            # A copy, because the state's own arrays are given away in the next step.
            report = _gather([leaves[i] for i in self._survey.positions])
            for number in report:
                number.copy_to_host_async()
            self._sent = _Sent(self._updates, report, self._clocks)
        elif self._updates - self._sent.update >= self._lag:
            self._compare(self._sent)
            self._sent = None

    def _after(self, clocks: Sequence[Any], told: Told) -> list[Any]:
        """Return clocks after an update that was told so; those that it did not run stay."""
        after = list(clocks)
        for i in self._running(told):
            after[i] = clocks[i].after(told[i])
        return after

    def _running(self, told: Told) -> list[int]:
        """Return the places of the clocks that move on in an update that is told so."""
        places = enumerate(self._survey.places)
        return [i for i, place in places if not place.asks and self._survey.is_open(place, told)]

    def _compare(self, sent: _Sent) -> None:
        """Set the copy right where it differed from the device's clocks some updates ago."""
        found = self._known(sent.report)
        if _agree(found, sent.clocks):
            return
        for told in list(self._history)[sent.update - self._updates :]:
            found = self._after(found, told)
        self._clocks = found

    def _read(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the clocks of a state, for which this waits."""
        return self._known(jax.device_get([leaves[i] for i in self._survey.positions]))

    def _known(self, report: Sequence[Any]) -> list[Any]:
        """Return clocks whose scalars are those of a report."""
        # Python's numbers: their arithmetic is the fastest on scalars.
        scalars = [np.asarray(number).item() for number in report]
        return self._survey.clocks(dict(zip(self._survey.positions, scalars, strict=True)))


@jax.jit
def _gather(scalars: Sequence[jax.Array]) -> list[jax.Array]:
    """Return copies of scalars."""
    return [jnp.copy(scalar) for scalar in scalars]


def _agree(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Return whether two copies of clocks say the same; sums in float32 are rounded."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(a == b or math.isclose(a, b, rel_tol=1e-5) for a, b in pairs)
