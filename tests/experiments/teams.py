"""Threads in the place of processes that train together."""

import threading
from concurrent.futures import ThreadPoolExecutor

from optalr.experiments.errors import ExperimentError
from optalr.experiments.processes import Team

SECONDS = 30


class _ThreadTeam(Team):
    """One of several threads that tell each other what processes would."""

    def __init__(self, index, count, meeting):
        super().__init__(index, count)
        self._barrier, self._said = meeting

    def _told(self, mine):
        self._said[self.index] = mine
        self._barrier.wait(SECONDS)
        found = [self._said[i] for i in range(self.count)]
        self._barrier.wait(SECONDS)
        return found

    def largest(self, *numbers):
        """Return the largest of each number."""
        return tuple(map(max, zip(*self._told(numbers), strict=True)))

    def texts(self, text):
        """Return the text of each thread."""
        return self._told(text)


def together(act, count=2):
    """Call ``act(team)`` in as many threads, and return what each returned or was refused with."""
    meeting = threading.Barrier(count), {}

    def one(index):
        try:
            return act(_ThreadTeam(index, count, meeting))
        except ExperimentError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
