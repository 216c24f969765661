"""Several processes that train one run together, on the devices of all, by ``jax.distributed``.

All run the same program, and meet wherever arrays lie on the devices of several. So none may go its
own way alone: where one stops, fails or saves, all have to, after the same step. What only one of
them knows (a signal, a full disk, its clock) is told to the others at fixed places.

What cannot be told, such as a process that was killed, ends the others as well: on CPUs the next
collective fails, elsewhere ``jax.distributed`` misses the heartbeats of the dead and ends them.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import numpy as np

from optalr.experiments.errors import ExperimentError, LostProcessError

# jax's words for what is no lost process.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


class Team:
    """The processes of a run: what one of them knows, all get to know.

    Every method is called by all, at the same place. With one process none does anything.

    Attributes:
      index: which of them this is.
      count: how many there are.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    @property
    def writes(self) -> bool:
        """Whether this process writes the records and prints."""
        return self.index == 0

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest that any process has of each number."""
        if self.count == 1:
            return numbers
        return tuple(_gathered(np.array(numbers, np.int32)).max(axis=0).tolist())

    def texts(self, text: str) -> list[str]:
        """Return the text of every process."""
        if self.count == 1:
            return [text]
        data = text.encode()
        (length,) = self.largest(len(data))
        if not length:
            return [""] * self.count
        padded = np.frombuffer(data.ljust(length, b"\0"), np.uint8)
        return [bytes(row).rstrip(b"\0").decode() for row in _gathered(padded)]

    @contextlib.contextmanager
    def one_fate(self) -> Iterator[None]:
        """Let all fail with what one fails with here. No process waits for another in between.

        Raises:
          ExperimentError: one process has; ``shared`` says that all know.
        """
        if self.count == 1:
            yield
            return
        own: ExperimentError | None = None
        try:
            yield
        except ExperimentError as error:
            own = error
        for index, said in enumerate(self.texts("" if own is None else str(own))):
            if said and own is None:
                own = ExperimentError(f"process {index}: {said}")
        if own is not None:
            own.shared = True
            raise own

    def check_same(self, name: str, value: str, *, remedy: str) -> None:
        """Raise in all processes if they differ in what they should have in common."""
        said = self.texts(value)
        for index, other in enumerate(said):
            if other != said[0]:
                first, second = _where_they_differ(said[0], other)
                error = ExperimentError(
                    f"process 0 and process {index} differ in {name}: {first!r} and {second!r}. "
                    f"{remedy}"
                )
                error.shared = True
                raise error

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Say in one line that another process has gone, where jax reports a failed collective.

        Raises:
          LostProcessError: it did.
        """
        import jax

        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            line = str(error).strip().split("\n", 1)[0]
            # A failed collective may arrive as either, by the release of jax.
            failed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in line
            if self.count == 1 or not failed or line.startswith(_OWN_FAULTS):
                raise
            raise LostProcessError(
                "another process of this run has ended, or cannot be reached: see what it said, "
                f"then go on by `optalr resume` in all of them ({line})."
            ) from error


def joined() -> bool:
    """Return whether this process is one of several."""
    distributed = sys.modules.get("jax.distributed")
    return distributed is not None and distributed.is_initialized()


def leave(code: int) -> None:
    """End this process at once, where it would wait for others that do not know that it leaves."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _gathered(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, one a row."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Return the first lines that differ."""
    pairs = zip([*one.splitlines(), "(nothing)"], [*other.splitlines(), "(nothing)"], strict=False)
    return next((first, second) for first, second in pairs if first != second)
