"""Checkpoints of a run: whole or absent, the latest few kept, restored to the same bits.

    checkpoints/24/state.npz    the arrays, in NumPy's format, one a leaf
    checkpoints/24/meta.json    the step, the run's identity, names, dtypes and shapes of the leaves
    checkpoints/24/SHA256SUMS   checksums of both

A folder is filled under another name, written to the disk and then renamed. Checksums are compared
before anything is used, and the newest intact checkpoint is the one that counts.

A run is in one process, so NumPy's format will do. With Orbax, where the disk is full, threads of
its own print their tracebacks, and few of the bits that a disk may turn are noticed; a save takes
0.2 s and its import a second.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optalr.experiments.errors import ExperimentError, warnings_log, writing
from optalr.experiments.records.rows import to_json
from optalr.experiments.records.signals import held
from optalr.experiments.records.writing import (
    SUMS,
    changed_files,
    free_path,
    new_folder,
    read_sums,
    remove_folder,
    sums_of,
)

_STATE, _META = "state.npz", "meta.json"
_STEP, _SHAPES = "step", "shapes"
# Digits of a leaf's number in its name: no model here has 100 000 leaves.
_DIGITS = 5
# What Orbax leaves in a checkpoint: the format of earlier versions.
_FORMER = "_CHECKPOINT_METADATA"


class Checkpoints:
    """The checkpoints of one run, named by step.

    Args:
      path: their folder, which is made with the first of them.
      keep: how many of the latest stay.
    """

    def __init__(self, path: Path, keep: int):
        self.path, self._keep = path, keep
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
        latest = self.latest()
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
        folder = self._folder(step)
        named = _named(state)
        arrays: dict[str, Any] = {name: _storable(leaf) for name, leaf in named.items()}
        text = to_json({**meta, _STEP: step, _SHAPES: _shapes(named)}, indent=1)
        with held(), writing(folder):
            if folder.exists():  # damaged, or it would count as intact
                remove_folder(folder)
            with new_folder(folder) as scratch:
                with open(scratch / _STATE, "wb") as file:
                    np.savez(file, **arrays)
                (scratch / _META).write_text(text, encoding="utf-8")
                (scratch / SUMS).write_text(sums_of(scratch, (_STATE, _META)), encoding="utf-8")
            self._intact.add(step)
            self._prune()

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
        wanted = _shapes(_named(like))
        differing = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise ExperimentError(
                f"the checkpoint of step {step} does not fit this run: {name[_DIGITS:]} is "
                f"{saved.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the run. "
                "Was the config or optalr changed? Start anew with another --out."
            )
        leaves = jax.tree_util.tree_leaves_with_path(like)
        with np.load(folder / _STATE, allow_pickle=False) as arrays:
            restored = [
                _restored(arrays[name], leaf) if (name := _name(i, path)) in saved else leaf
                for i, (path, leaf) in enumerate(leaves)
            ]
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
            listed = set(read_sums(folder))
            changed = changed_files(folder) if listed == {_STATE, _META} else [SUMS]
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
        for step in sorted(self._intact | set(self._steps()))[: -self._keep]:
            if self._folder(step).exists():
                remove_folder(self._folder(step))
            self._intact.discard(step)
        for scratch in self.path.glob(".*"):
            shutil.rmtree(scratch, ignore_errors=True)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by number and key path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(i, path): leaf for i, (path, leaf) in enumerate(leaves)}


def _name(index: int, path: Any) -> str:
    # The number keeps leaves apart whose paths print alike. A "/" would make folders.
    return f"{index:0{_DIGITS}d}{jax.tree_util.keystr(path)}".replace("/", "_")


def _shapes(named: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items()}


def _storable(leaf: Any) -> np.ndarray:
    """Return a leaf as an array that any NumPy can read."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    # bfloat16 and its kin are not NumPy's own; their bytes are.
    return array if array.dtype.isbuiltin == 1 else array[..., None].view(np.uint8)


def _restored(array: np.ndarray, like: Any) -> Any:
    """Return a stored array as the leaf that it was, where ``like`` lies."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(jnp.array(array), impl=jax.random.key_impl(like))
        return jax.device_put(keys, like.sharding)
    dtype = np.dtype(like.dtype)
    if array.dtype != dtype:
        array = array.view(dtype)[..., 0]
    # A copy, since the training step takes the memory of its argument for its result.
    return jax.device_put(jnp.array(array, copy=True), like.sharding)
