"""Orbax checkpoints of a run: atomic, the latest few kept, restored to the same bits."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from optalr.experiments.errors import ExperimentError

# Orbax reports every save at INFO and a missing multi-host setup at WARNING.
logging.getLogger("absl").setLevel(logging.ERROR)

_SHAPES = "shapes"
# Digits of a leaf's number in its name: no model here has 100 000 leaves.
_DIGITS = 5


class Checkpoints:
    """The checkpoints of one run, named by step.

    Args:
      path: their folder, which is made if it is not there.
      keep: how many of the latest stay.
    """

    def __init__(self, path: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            path.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            ),
            item_names=("state", "meta"),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Return the step of the latest complete checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Save a pytree of arrays and a dict of plain values, once for each step."""
        if step in self._manager.all_steps():
            return
        named = _named(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(named),
            meta=ocp.args.JsonSave({**meta, _SHAPES: _shapes(named)}),
        )
        self._manager.save(step, args=items)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the dict saved at ``step``."""
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        return {key: value for key, value in meta.items() if key != _SHAPES}

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the pytree saved at ``step``, in the structure of ``like``, and the dict.

        Raises:
          ExperimentError: the checkpoint does not fit, because code or config have changed.
        """
        meta = self._restore(step, meta=ocp.args.JsonRestore())["meta"]
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        # Compared here, because Orbax's own error says neither where the trees differ nor what to
        # do about it.
        saved, wanted = meta.pop(_SHAPES), _shapes(target)
        differing = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise ExperimentError(
                f"the checkpoint of step {step} does not fit this run: {name[_DIGITS:]} is "
                f"{saved.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in the run. "
                "Was the config or optalr changed? Start anew with another --out."
            )
        state = self._restore(step, state=ocp.args.StandardRestore(target))["state"]
        leaves = jax.tree_util.tree_leaves_with_path(like)
        restored = [state.get(_name(i, path), leaf) for i, (path, leaf) in enumerate(leaves)]
        return jax.tree.unflatten(jax.tree.structure(like), restored), meta

    def _restore(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by number and key path, without empty arrays, which Orbax refuses."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(i, path): leaf for i, (path, leaf) in enumerate(leaves) if np.size(leaf)}


def _name(index: int, path: Any) -> str:
    # The number keeps leaves apart whose paths print alike. A "/" would make folders.
    return f"{index:0{_DIGITS}d}{jax.tree_util.keystr(path)}".replace("/", "_")


def _shapes(named: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named.items()}
