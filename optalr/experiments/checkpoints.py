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


class Checkpoints:
    """The checkpoints of one run, named by step."""

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
        """Return the step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Save a pytree of arrays and a dict of plain values."""
        if step in self._manager.all_steps():
            return
        named = ocp.args.StandardSave(_named(state))
        self._manager.save(
            step, args=ocp.args.Composite(state=named, meta=ocp.args.JsonSave(meta))
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the pytree saved at ``step``, in the structure of ``like``, and the dict.

        Raises:
          ExperimentError: the checkpoint does not fit, because code or config have changed.
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0]
            raise ExperimentError(
                f"the checkpoint of step {step} does not fit this run (was it made by another "
                f"version?): {reason}. Start anew with another --out."
            ) from error
        leaves = jax.tree_util.tree_leaves_with_path(like)
        restored = [saved.state.get(_name(i, path), leaf) for i, (path, leaf) in enumerate(leaves)]
        return jax.tree.unflatten(jax.tree.structure(like), restored), dict(saved.meta)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by number and key path; an empty array holds nothing to save."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(i, path): leaf for i, (path, leaf) in enumerate(leaves) if np.size(leaf)}


def _name(index: int, path: Any) -> str:
    # The number keeps leaves apart whose paths print alike; "/" would make folders.
    return f"{index:05d}{jax.tree_util.keystr(path)}".replace("/", "_")
