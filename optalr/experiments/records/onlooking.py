"""The folder of a run that several processes train, of which the first writes it."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from optalr.experiments.errors import ExperimentError
from optalr.experiments.processes import Team
from optalr.experiments.records.run_folder import RunFolder
from optalr.experiments.records.writing import write_atomically

# What the first process leaves for a moment, for the others to see.
_MARK = ".seen"
# A file system of a network may show a new file late.
_PATIENCE = 20.0
_LOOK_SECONDS = 0.1


class SeenFolder(RunFolder):
    """A run on disk that is read here, and written by another process.

    Args:
      path: the folder.
    """

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold nothing: the lock is with the process that writes."""
        yield

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write nothing."""

    def cut(self, name: str, last_step: int, *, noted: Mapping[str, Any] | None = None) -> None:
        """Cut nothing."""

    def reopen(self) -> None:
        """Change no checksum."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write nothing."""


def folder_of(team: Team) -> type[RunFolder]:
    """Return what stands for the run's folder in this process."""
    return RunFolder if team.writes else SeenFolder


def made_in(team: Team, make: Callable[[], RunFolder]) -> RunFolder:
    """Return the folder that the first process makes, as each process has it.

    Raises:
      ExperimentError: it could not be made, or another process does not see it.
    """
    made = None
    with team.one_fate():
        if team.writes:
            made = make()
    (path, *_) = team.texts("" if made is None else str(made.path.absolute()))
    folder = SeenFolder(path) if made is None else made
    check_seen(team, folder.path)
    return folder


def check_seen(team: Team, path: Path, *, patience: float = _PATIENCE) -> None:
    """Raise in all processes if one does not see the folder that the first writes.

    Args:
      team: the processes.
      path: the folder.
      patience: how many seconds a process waits to see it.

    Raises:
      ExperimentError: it has none at that path, or one of its own.
    """
    if team.count == 1:
        return
    (wanted, *_) = team.texts(secrets.token_hex(8))
    with team.one_fate():
        if team.writes:
            write_atomically(path / _MARK, wanted)
    with team.one_fate():
        if not _appears(path / _MARK, wanted, patience):
            raise ExperimentError(
                f"{path} is not the folder that process 0 writes: name one that all processes see, "
                "on a disk that their machines share."
            )
    with team.one_fate():
        if team.writes:
            (path / _MARK).unlink(missing_ok=True)


def _appears(path: Path, content: str, patience: float) -> bool:
    """Return whether a file has that content, now or soon."""
    began = time.monotonic()
    while time.monotonic() - began < patience:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == content:
                return True
        time.sleep(_LOOK_SECONDS)
    return False
