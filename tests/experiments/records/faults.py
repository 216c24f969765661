"""Disks that fail, and small runs to try them on."""

import builtins
import contextlib
import errno
import io
import json
import os
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from optalr.experiments.configs.config import from_table
from optalr.experiments.records.checkpoints import Checkpoints
from optalr.experiments.records.run_folder import EVALUATIONS, METRICS

SMALL = from_table(
    {
        "data": {"limit": 64},
        "model": {"name": "linear"},
        "method": {"name": "adam", "learning_rate": 1e-2},
        "train": {"epochs": 3, "batch_size": 32},
        "record": {"checkpoint_every": 1, "keep": 2},
    }
)


class Killed(BaseException):
    """Stands for the end of the process, which nothing can catch."""


class Disk:
    """Counts the file operations below a folder, and fails from the ``fails_at``-th on.

    Args:
      folder: operations elsewhere are not counted.
      fails_at: the first operation to fail; 0 fails none.
      kind: ``once`` (one operation finds the disk full), ``stays`` (so do all later ones) or
        ``killed`` (the process ends there, as far as the disk can tell).
    """

    def __init__(self, folder, fails_at=0, kind="once"):
        self.folder, self.fails_at, self.kind = str(folder), fails_at, kind
        self.count = 0

    def step(self):
        """Count an operation, and fail it if it is its turn."""
        self.count += 1
        if not self.fails_at or self.count < self.fails_at:
            return
        if self.kind == "killed":
            raise Killed
        if self.kind == "stays" or self.count == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder)

    @contextlib.contextmanager
    def mounted(self):
        """Put the disk in the place of the real one."""
        with contextlib.ExitStack() as stack:
            for module, name in (
                (builtins, "open"),
                (io, "open"),
                (os, "mkdir"),
                (os, "rename"),
                (os, "replace"),
                (os, "fsync"),
                (os, "truncate"),
            ):
                wrapped = self._wrap(getattr(module, name), is_open=name == "open")
                stack.enter_context(mock.patch.object(module, name, wrapped))
            yield self

    def _wrap(self, function, is_open):
        def wrapped(*arguments, **options):
            target = arguments[0]
            if isinstance(target, int):  # os.fsync; only files below the folder are synced here
                self.step()
            elif str(target).startswith(self.folder):
                mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
                if is_open and not set(str(mode)) & set("wax"):
                    return function(*arguments, **options)  # reading takes no room
                self.step()
                if is_open:
                    return _File(function(*arguments, **options), self)
            return function(*arguments, **options)

        return wrapped


class _File:
    """A file whose writes are counted; one that fails has written half."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        """Write all of it, or half of it and fail."""
        try:
            self._disk.step()
        except BaseException:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def snapshot(trainer, folder):
    """Return everything that a finished run leaves, but for what the clock says."""
    checkpoints = Checkpoints(Path(folder.path) / "checkpoints", 2)
    latest = checkpoints.latest()
    state, _ = checkpoints.restore(latest, trainer.init(0))
    timed = ("seconds", "compile_seconds")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in folder.rows(name)]
        for name in (METRICS, EVALUATIONS)
    ]
    result = {k: v for k, v in folder.result().items() if k not in timed}
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return {"step": latest, "leaves": leaves, "rows": json.dumps(rows), "result": result}
