"""One process at a time in a folder."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from optalr.experiments.errors import ExperimentError, writing

LOCK, OWNER = ".lock", ".owner"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock. The system frees it when the process ends, however it ends.

    Raises:
      ExperimentError: another process holds it; the message names that process.
    """
    lock = filelock.FileLock(folder / LOCK, blocking=False, thread_local=False)
    with writing(folder / LOCK):
        try:
            lock.acquire()
        except filelock.Timeout:
            owner = owner_of(folder)
            raise ExperimentError(
                f"{folder} is in use by another process{f' ({owner})' if owner else ''}: wait for "
                "it, or stop it."
            ) from None
    note = folder / OWNER
    try:
        # For the message only, so a disk without room must not stop a run here.
        with contextlib.suppress(OSError):
            note.write_text(
                f"process {os.getpid()} on {platform.node()} since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}",
                encoding="utf-8",
            )
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            lock.release()


def owner_of(folder: Path) -> str:
    """Return who holds a folder's lock, or who held it when it was killed; empty for nobody."""
    try:
        return (folder / OWNER).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
