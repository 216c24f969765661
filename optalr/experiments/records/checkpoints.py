"""Checkpoints of a run: whole or absent, the latest few kept, restored to the same bits.

    checkpoints/24/state.npz    the arrays, in NumPy's format, one a leaf
    checkpoints/24/meta.json    the step, the run's identity, names, dtypes and shapes of the leaves
    checkpoints/24/SHA256SUMS   checksums of both

Where several processes train, each writes a file of its own, ``state-0-of-2.npz``, with what it
holds. Any number of processes, on any number of devices, can go on from either.

A folder is filled under another name, written to the disk and then renamed: by the first process,
once all have written theirs and said its checksum. Checksums are compared before anything is used,
and the newest intact checkpoint is the one that counts.

NumPy's format will do. With Orbax, where the disk is full, threads of its own print their
tracebacks, and few of the bits that a disk may turn are noticed. A save takes 0.2 s, and its import
a second.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from optalr.experiments.errors import ExperimentError, warnings_log, writing
from optalr.experiments.processes import Team
from optalr.experiments.records.arrays import (
    DIGITS,
    StoredArrays,
    file_names,
    named_leaves,
    shapes,
    write_arrays,
)
from optalr.experiments.records.rows import to_json
from optalr.experiments.records.signals import held
from optalr.experiments.records.writing import (
    SUMS,
    changed_files,
    free_path,
    read_sums,
    remove_folder,
    sums_of,
    sync,
)

_META = "meta.json"
_STEP, _SHAPES = "step", "shapes"
# What Orbax leaves in a checkpoint: the format of earlier versions.
_FORMER = "_CHECKPOINT_METADATA"


class Checkpoints:
    """The checkpoints of one run, named by step.

    Args:
      path: their folder, which is made with the first of them.
      keep: how many of the latest stay.
      team: the processes that write and read them together; by default one.
    """

    def __init__(self, path: Path, keep: int, team: Team | None = None):
        self.path, self._keep, self._team = path, keep, team or Team()
        self._intact: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def latest(self) -> int | None:
        """Return the step of the newest intact checkpoint, or None if there is none at all.

        Raises:
          ExperimentError: there are some, but all are damaged.
        """
        found = None
        with self._team.one_fate():
            # One process looks for all: reading every file takes a while.
            if self._team.writes:
                found = self._newest()
        (step,) = self._team.largest(-1 if found is None else found)
        if step < 0:
            return None
        self._intact.add(step)
        return step

    def _newest(self) -> int | None:
        problems = []
        for step in reversed(self._steps()):
            problem = None if step in self._intact else self._problem(step)
            if problem is None:
                self._intact.add(step)
                return step
            problems.append(f"{self._folder(step)} {problem}")
        if problems:
            raise ExperimentError(
                f"no checkpoint is intact: {'; '.join(problems)}. Put a copy back, or delete "
                f"{self.path} and resume: training then begins anew, and comes to the same bits."
            )
        return None

    def set_damaged_aside(self) -> None:
        """Rename what is newer than the latest intact checkpoint and damaged, and say so.

        Raises:
          ExperimentError: there are some, but all are damaged.
        """
        latest = self._newest()
        for step in self._steps():
            if latest is not None and step > latest:
                folder = self._folder(step)
                aside = free_path(self.path / f"damaged-{step}")
                warnings_log.warning(
                    "%s %s; going on from step %d. The damaged one is now %s.",
                    folder,
                    self._problem(step),
                    latest,
                    aside,
                )
                with writing(aside):
                    os.rename(folder, aside)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Save a pytree of arrays and a dict of plain values, once for each step.

        Raises:
          ExperimentError: the system refused; earlier checkpoints are as they were.
        """
        if step in self._intact:
            return
        team, named = self._team, named_leaves(state)
        files = file_names(team.count)
        folder, own = self._folder(step), files[team.index]
        # One process at a time holds the run's lock, so the name is free.
        scratch = folder.with_name(f".{step}.new")
        with held(), self._cleared(scratch):
            with team.one_fate(), writing(folder):
                if team.writes:
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir(parents=True)
            sums = ""
            with team.one_fate(), writing(folder):
                write_arrays(scratch / own, named)
                sync(scratch / own)
                sums = sums_of(scratch, [own])
            # What each process wrote, by what it said of it: no other has to read it.
            sums = "".join(team.texts(sums))
            with team.one_fate(), writing(folder):
                if team.writes:
                    text = to_json({**meta, _STEP: step, _SHAPES: shapes(named)}, indent=1)
                    self._commit(scratch, folder, text=text, sums=sums)
            self._intact.add(step)
            with team.one_fate(), writing(folder):
                self._prune()

    @contextlib.contextmanager
    def _cleared(self, scratch: Path) -> Iterator[None]:
        """Leave nothing of a save that fails."""
        try:
            yield
        except BaseException:
            if self._team.writes:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _commit(self, scratch: Path, folder: Path, *, text: str, sums: str) -> None:
        """Make a filled folder a checkpoint."""
        absent = [name for name in file_names(self._team.count) if not (scratch / name).is_file()]
        if absent and scratch.is_dir():
            raise ExperimentError(
                f"{folder}: the first process does not see {', '.join(absent)}, which another has "
                "written: the run folder must lie where all processes see the same files."
            )
        (scratch / _META).write_text(text, encoding="utf-8")
        (scratch / SUMS).write_text(sums + sums_of(scratch, [_META]), encoding="utf-8")
        for path in (scratch / _META, scratch / SUMS, scratch):
            sync(path)
        if folder.exists():  # damaged, or it would count as intact
            remove_folder(folder)
        os.rename(scratch, folder)
        sync(folder.parent)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the dict saved at ``step``."""
        meta = json.loads((self._folder(step) / _META).read_bytes())
        return {key: value for key, value in meta.items() if key not in (_STEP, _SHAPES)}

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the pytree saved at ``step``, in the structure of ``like``, and the dict.

        Raises:
          ExperimentError: the checkpoint does not fit, because code or config have changed.
        """
        folder = self._folder(step)
        saved = json.loads((folder / _META).read_bytes())[_SHAPES]
        named = named_leaves(like)
        wanted = shapes(named)
        differing = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise ExperimentError(
                f"the checkpoint of step {step} does not fit this run: {name[DIGITS:]} is "
                f"{saved.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the run. "
                "Was the config or optalr changed? Start anew with another --out."
            )
        files = [folder / name for name in file_names(len(read_sums(folder)) - 1)]
        with StoredArrays(files) as arrays:
            restored = [arrays.restored(name, leaf) for name, leaf in named.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored), self.meta(step)

    def _folder(self, step: int) -> Path:
        return self.path / str(step)

    def _steps(self) -> list[int]:
        names = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _problem(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, a phrase, or None."""
        folder = self._folder(step)
        if not (folder / SUMS).is_file():
            if (folder / _FORMER).exists():
                return (
                    "is of an earlier optalr, in Orbax's format: only that version, which "
                    "environment.json names, can go on with it"
                )
            return f"has no {SUMS}"
        try:
            # An emptied list of checksums would vouch for anything.
            listed = read_sums(folder)
            complete = set(listed) == {_META, *file_names(len(listed) - 1)}
            changed = changed_files(folder) if complete else [SUMS]
            meta = {} if changed else json.loads((folder / _META).read_bytes())
        except ExperimentError as error:
            return f"is damaged ({error})"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if changed:
            return f"is damaged ({' and '.join(changed)} changed since)"
        if meta[_STEP] != step:
            return f"was renamed (it is of step {meta[_STEP]})"
        return None

    def _prune(self) -> None:
        """Delete all but the latest intact checkpoints, and what interrupted writes left."""
        there = set(self._steps()) if self._team.writes else set()
        for step in sorted(self._intact | there)[: -self._keep]:
            if step in there:
                remove_folder(self._folder(step))
            self._intact.discard(step)
        if self._team.writes:
            for scratch in self.path.glob(".*"):
                shutil.rmtree(scratch, ignore_errors=True)
