"""The arrays of a checkpoint: in one file, or in a file for each process that held parts of them.

A file is NumPy's own, ``.npz``. A whole array has the name of its leaf, number and key path, as in
``00003.opt_state.memory['w']``. A part of one, of which other processes had the others, has the
place of its first entry besides: ``00003.opt_state.memory['w']@0,128``.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Digits of a leaf's number in its name: no model here has 100 000 leaves.
DIGITS = 5
_PLACE = "@"


def file_names(num_processes: int) -> list[str]:
    """Return the names of a checkpoint's files of arrays."""
    if num_processes <= 1:
        return ["state.npz"]
    return [f"state-{i}-of-{num_processes}.npz" for i in range(num_processes)]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by number and key path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # The number keeps leaves apart whose paths print alike. A "/" would make folders.
    return {
        f"{i:0{DIGITS}d}{jax.tree_util.keystr(path)}".replace("/", "_"): leaf
        for i, (path, leaf) in enumerate(leaves)
    }


def shapes(named: Mapping[str, Any]) -> dict[str, str]:
    """Return dtype and shape of each leaf, as text."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items()}


def write_arrays(path: Path, named: Mapping[str, Any]) -> None:
    """Write what this process has of each leaf; of what several have, one writes it."""
    arrays: dict[str, Any] = {}
    for name, leaf in named.items():
        arrays |= _parts(name, leaf)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _parts(name: str, leaf: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what this process writes of a leaf, with its name."""
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        yield name, _storable(leaf)
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            starts = ",".join(str(part.start or 0) for part in shard.index)
            whole = shard.data.shape == leaf.shape
            yield name if whole else f"{name}{_PLACE}{starts}", _storable(shard.data)


class StoredArrays:
    """The arrays in the files of a checkpoint.

    Args:
      paths: the files, all of them.
    """

    def __init__(self, paths: Sequence[Path]):
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        for path in paths:
            file = self._open.enter_context(np.load(path, allow_pickle=False))
            self._files |= dict.fromkeys(file.files, file)

    def __enter__(self) -> "StoredArrays":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def restored(self, name: str, like: Any) -> Any:
        """Return a stored leaf where ``like`` lies, each process the part that it has of that.

        Raises:
          ValueError: a part of it is in none of the files.
        """
        if _is_key(like):
            data = self.restored(name, jax.random.key_data(like))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))
        parts = list(self._read(name, np.dtype(like.dtype)))

        def part(index: Any) -> jax.Array:
            # A copy, since the training step takes the memory of its argument for its result.
            return jnp.array(_assembled(parts, index, like.shape), copy=True)

        return jax.make_array_from_callback(like.shape, like.sharding, part)

    def _read(self, name: str, dtype: np.dtype) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield the parts of a leaf, each with the place of its first entry."""
        for key, file in self._files.items():
            # No name is the beginning of another: each has a number of its own.
            if key == name or key.startswith(name + _PLACE):
                array = file[key]
                if array.dtype != dtype:
                    array = array.view(dtype)[..., 0]
                text = key[len(name) + len(_PLACE) :]
                yield tuple(map(int, text.split(","))) if text else (0,) * array.ndim, array


def _assembled(
    parts: Sequence[tuple[tuple[int, ...], np.ndarray]],
    index: tuple[slice, ...],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return the entries at ``index`` of an array of which there are parts."""
    wanted = [range(size)[part] for part, size in zip(index, shape, strict=True)]
    lengths = tuple(map(len, wanted))
    if len(parts) == 1 and parts[0][1].shape == shape:
        return parts[0][1][index]
    found, missing = np.empty(lengths, parts[0][1].dtype if parts else None), np.prod(lengths)
    for starts, array in parts:
        common = [
            range(max(want.start, start), min(want.stop, start + size))
            for want, start, size in zip(wanted, starts, array.shape, strict=True)
        ]
        if all(common):
            there = tuple(
                slice(c.start - start, c.stop - start)
                for c, start in zip(common, starts, strict=True)
            )
            here = tuple(
                slice(c.start - want.start, c.stop - want.start)
                for c, want in zip(common, wanted, strict=True)
            )
            found[here] = array[there]
            missing -= found[here].size
    if missing:
        raise ValueError(f"{missing} numbers of an array of {shape} are in no file")
    return found


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> np.ndarray:
    """Return an array as any NumPy can read it."""
    array = np.asarray(leaf)
    # bfloat16 and its kin are not NumPy's own; their bytes are.
    return array if array.dtype.isbuiltin == 1 else array[..., None].view(np.uint8)
