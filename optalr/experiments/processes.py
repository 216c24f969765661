"""Several processes that train one run together, on the devices of all, by ``jax.distributed``.

All run the same program, and meet wherever arrays lie on the devices of several. So none may go its
own way alone: where one stops, fails or saves, all have to, after the same step. What only one of
them knows (a signal, a full disk, its clock) is told to the others at fixed places.

What cannot be told, such as a process that was killed, ends the others as well: on CPUs the next
collective fails, elsewhere ``jax.distributed`` misses the heartbeats of the dead and ends them.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from optalr.experiments.errors import ExperimentError, LostProcessError, warnings_log

# What stands for the coordinator where jax finds the processes by itself.
AUTOMATIC = "auto"
_COORDINATOR = re.compile(r"(?P<host>[^\s:]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})")
_LARGEST_PORT = 2**16 - 1
# Between two looks whether the coordinator is there.
_LOOK_SECONDS = 0.2
# A run that no longer hears of a process ends after so long; jax's own default is 100 s. Heartbeats
# come from threads of their own, so neither compiling nor a slow disk delays them.
_HEARTBEAT_SECONDS = 60
# jax's words for what is no lost process.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other."""

    coordinator: str = ""
    """HOST:PORT of process 0, where several processes of one run find each other; auto under SLURM,
    Open MPI, Kubernetes or on a TPU pod, where jax knows. By default there is one process."""
    processes: int = 0
    """How many there are, each started by this same command."""
    process: int = -1
    """Which of them this is, from 0 on; the first writes the run folder, which all must see."""
    wait: int = 300
    """Seconds to wait for the others at the start."""

    def check(self) -> None:
        """Raise ``ExperimentError`` if these do not go together."""
        named = self.processes != 0 or self.process != -1
        if self.wait < 1:
            raise ExperimentError(f"--wait must be at least 1 second, got {self.wait}.")
        if not self.coordinator:
            if named:
                raise ExperimentError(
                    "--processes and --process need --coordinator HOST:PORT beside them: the "
                    "address of process 0, and a free port there."
                )
            return
        if self.coordinator == AUTOMATIC:
            if named:
                raise ExperimentError(
                    "with --coordinator auto jax counts the processes: leave --processes and "
                    "--process out."
                )
            return
        found = _COORDINATOR.fullmatch(self.coordinator)
        if found is None or not 0 < int(found["port"]) <= _LARGEST_PORT:
            raise ExperimentError(
                f"--coordinator {self.coordinator!r} must be HOST:PORT, such as localhost:1234, or "
                "auto."
            )
        if self.processes < 1 or self.process < 0:
            raise ExperimentError(
                "--coordinator needs --processes N and --process I beside it: how many processes "
                "there are, and which this is, from 0 on."
            )
        if self.process >= self.processes:
            raise ExperimentError(
                f"--process {self.process} is none of {self.processes} processes: they count from "
                f"0 to {self.processes - 1}."
            )


ALONE = Processes()


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


@contextlib.contextmanager
def joined_by(given: Processes) -> Iterator[Team]:
    """Wait for the other processes of the run, and yield the team of all; one makes its own.

    Raises:
      ExperimentError: the arguments do not go together, or the others do not come in time.
      LostProcessError: another process was lost meanwhile.
    """
    given.check()
    team = _join(given) if given.coordinator else Team()
    with team.losses_named():
        yield team


def _join(given: Processes) -> Team:
    import jax

    where = {}
    if given.coordinator != AUTOMATIC:
        where = {
            "coordinator_address": given.coordinator,
            "num_processes": given.processes,
            "process_id": given.process,
        }
        _look_for(given)
    answers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=given.wait,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
        team = Team(jax.process_index(), jax.process_count())
    except (RuntimeError, ValueError, OSError) as error:
        line = str(error).strip().split("\n", 1)[0].rstrip(".")
        if given.coordinator == AUTOMATIC:
            raise ExperimentError(
                f"--coordinator auto: jax finds no other processes here ({line}). Name them by "
                "--coordinator HOST:PORT, --processes N and --process I."
            ) from error
        raise ExperimentError(
            f"the processes of this run did not find each other at {given.coordinator} within "
            f"{given.wait} s ({line}): start all {given.processes} of them, by the same command "
            "but for --process."
        ) from error
    # jax waits for SIGTERM itself, which would keep it from whoever asked before.
    for number, answer in answers.items():
        signal.signal(number, answer)
    _check_devices(jax.devices())
    if not team.writes:
        warnings_log.setLevel(logging.ERROR)  # the first says the same
    return team


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


def _look_for(given: Processes) -> None:
    """Wait until the coordinator's port is open, or is free in the process that opens it.

    jax would end the process with a page of text where it finds nobody.
    """
    host, _, port = given.coordinator.rpartition(":")
    place, began = (host.strip("[]"), int(port)), time.monotonic()
    if given.process == 0:
        return
    problem: OSError | None = None
    while time.monotonic() - began < given.wait:
        try:
            socket.create_connection(place, timeout=given.wait).close()
            return
        except OSError as error:
            problem = error
            time.sleep(_LOOK_SECONDS)
    raise ExperimentError(
        f"nobody answers at --coordinator {given.coordinator} within {given.wait} s "
        f"({problem}): start process 0 there, or let the others wait longer by --wait."
    )


def _check_devices(devices: list[Any]) -> None:
    """Raise if processes have different numbers of devices, in all of them alike."""
    counts = np.bincount([device.process_index for device in devices])
    if len(set(counts.tolist())) > 1:
        raise ExperimentError(
            f"the processes have {', '.join(map(str, counts))} devices: give each as many."
        )


def _gathered(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, one a row."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Return the first lines that differ."""
    pairs = zip([*one.splitlines(), "(nothing)"], [*other.splitlines(), "(nothing)"], strict=False)
    return next((first, second) for first, second in pairs if first != second)
