"""Ctrl-C and SIGTERM: finish what is being written, leave, say how to go on.

No handler here raises. Python would drop the exception where the signal happens to arrive inside a
callback of the garbage collector, of which jax has one, and the run would go on as if unasked.
Instead a handler notes the signal for whoever asks, or ends the process where it holds nothing
half-written.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a shell reports of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM.
EXIT_BASE = 128


class Interruption(KeyboardInterrupt):
    """A signal asked a run to stop, and it did.

    Attributes:
      number: the signal.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether a signal has asked to stop. A second one ends the process, unless it is writing."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        """Note a signal."""
        if self.number is not None:
            leave_at_once(number, frame)
        self.number = number

    def raise_if_asked(self, message: str) -> None:
        """Raise ``Interruption`` with a message, if a signal has asked to stop."""
        if self.number is not None:
            raise Interruption(self.number, message)


def leave_at_once(number: int, frame: Any) -> None:
    """End the process. Only for moments in which nothing is half-written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # the signal may have come while it was written to
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(2, b"\noptalr: interrupted.\n")
    os._exit(EXIT_BASE + number)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let ``handler`` answer the signals. Outside the main thread Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals wait until what is written here is whole."""
    waiting: list[int] = []
    try:
        with handled(lambda number, frame: waiting.append(number)):
            yield
    finally:
        for number in waiting[:1]:
            signal.raise_signal(number)
