"""How the processes of a run find each other."""

import contextlib
import dataclasses
import logging
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from optalr.experiments.errors import ExperimentError, warnings_log
from optalr.experiments.processes import Team

# What stands for the coordinator where jax finds the processes by itself.
AUTOMATIC = "auto"
_COORDINATOR = re.compile(r"(?P<host>[^\s:]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})")
_LARGEST_PORT = 2**16 - 1
# Between two looks whether the others are there.
_LOOK_SECONDS = 0.2
# jax gives up so much later than we do, since it ends the process then, with a page of text.
_LATER_SECONDS = 60
# A run that no longer hears of a process ends after so long; jax's own default is 100 s. Heartbeats
# come from threads of their own, so neither compiling nor a slow disk delays them.
_HEARTBEAT_SECONDS = 60


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
    # Its own answer to SIGTERM. Older releases of jax give it unasked; see below.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    answers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def meet() -> Team:
        jax.distributed.initialize(
            **where,
            initialization_timeout=given.wait + _LATER_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
        return Team(jax.process_index(), jax.process_count())

    try:
        team = _waited_for(meet, given.wait)
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_found(given, error) from error
    # Who answered signals before answers them again.
    for number, answer in answers.items():
        signal.signal(number, answer)
    _check_devices(jax.devices())
    if not team.writes:
        warnings_log.setLevel(logging.ERROR)  # the first says the same
    return team


def _waited_for(act: Callable[[], Team], seconds: float) -> Team:
    """Return what ``act`` returns, and answer signals meanwhile.

    Raises:
      TimeoutError: it takes longer.
    """
    outcomes: queue.SimpleQueue[Team | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put(act())
        except Exception as error:
            outcomes.put(error)

    # Python answers signals in the main thread alone, and not while that waits inside jax.
    threading.Thread(target=run, daemon=True).start()
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        with contextlib.suppress(queue.Empty):
            outcome = outcomes.get(timeout=_LOOK_SECONDS)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
    raise TimeoutError("not all have come")


def _not_found(given: Processes, error: Exception) -> ExperimentError:
    line = str(error).strip().split("\n", 1)[0].rstrip(".")
    if given.coordinator == AUTOMATIC:
        return ExperimentError(
            f"--coordinator auto: jax finds no other processes here ({line}). Name them by "
            "--coordinator HOST:PORT, --processes N and --process I."
        )
    return ExperimentError(
        f"the processes of this run did not find each other at {given.coordinator} within "
        f"{given.wait} s ({line}): start all {given.processes} of them, by the same command but "
        "for --process."
    )


def _look_for(given: Processes) -> None:
    """Wait until the coordinator's port is open; in the process that opens it, see that it is free.

    jax would end the process where it is not.
    """
    host, _, port = given.coordinator.rpartition(":")
    if given.process == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise ExperimentError(
                    f"port {port} of --coordinator {given.coordinator} cannot be had here "
                    f"({error.strerror}): take another, in all processes."
                ) from None
        return
    place, began, problem = (host.strip("[]"), int(port)), time.monotonic(), ""
    while time.monotonic() - began < given.wait:
        try:
            socket.create_connection(place, timeout=given.wait).close()
            return
        except OSError as error:
            problem = str(error)
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
