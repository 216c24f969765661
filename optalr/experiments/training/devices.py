"""Several devices, of one process or of several, that share each batch of a run."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optalr
from optalr.experiments.configs.config import MeshConfig
from optalr.experiments.data.dataset import Split
from optalr.experiments.errors import ExperimentError

_AXIS = "data"


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh | None:
    """Return the mesh that a config asks for, or None for one device.

    Raises:
      ExperimentError: there are too few devices, or the batch cannot be cut.
    """
    size, count = config.data, jax.process_count()
    if not size:
        if count == 1:
            return None
        raise ExperimentError(
            f"{count} processes need a mesh to share batches over: pass --mesh "
            f"data={jax.device_count()}, all their devices, or set mesh.data."
        )
    if size > jax.device_count():
        raise ExperimentError(
            f"mesh.data {size} needs {size} devices, and jax sees {jax.device_count()}: lower it, "
            f"or let a CPU stand for several by XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{size // count or 1}{' in each process' if count > 1 else ''}."
        )
    if size % count:
        raise ExperimentError(
            f"mesh.data {size} is no multiple of {count} processes, and each gives as many "
            f"devices: set it to {size - size % count or count}."
        )
    if batch_size % size:
        raise ExperimentError(
            f"train.batch_size {batch_size} is no multiple of mesh.data {size}: each device takes "
            f"as many examples. Set it to {batch_size - batch_size % size or size}."
        )
    taken = [
        device
        for process in range(count)
        for device in [d for d in jax.devices() if d.process_index == process][: size // count]
    ]
    return jax.make_mesh((size,), (_AXIS,), axis_types=(AxisType.Auto,), devices=taken)


def mesh_table(text: str) -> dict[str, int]:
    """Return the ``[mesh]`` section that ``--mesh data=8`` stands for.

    Raises:
      ExperimentError: the text is no such thing.
    """
    axis, _, size = text.partition("=")
    if axis != _AXIS or not (size.isascii() and size.isdigit() and len(size) < 10):
        raise ExperimentError(
            f"--mesh {text!r} must say how many devices share a batch, as in --mesh data=8."
        )
    return {axis: int(size)}


class Placement:
    """Where arrays lie: on one device.

    Attributes:
      everywhere: the sharding of what every device has; None on one device.
      by_examples: the sharding of a batch; None on one device.
    """

    everywhere: Any = None
    by_examples: Any = None

    def rounded(self, size: int) -> int:
        """Return the next number of examples that the devices can share."""
        return size

    def of_state(self, tx: Any, params: Any) -> Any:
        """Return the shardings of a method's state, whose factors may rest in parts."""
        return None

    def key(self, seed: int) -> jax.Array:
        """Return a random key, on every device."""
        return jax.random.key(seed)

    def whole(self, array: np.ndarray) -> jax.Array:
        """Return an array that every device has."""
        return jax.device_put(array)

    def shared(self, array: np.ndarray) -> Any:
        """Return an array of which each device has its rows."""
        return array

    def examples(self, split: Split, chosen: np.ndarray) -> tuple[Any, Any]:
        """Return the examples chosen, each device its share; a process reads those of its own."""
        part = split.take(chosen)
        return part.x, part.y


class MeshPlacement(Placement):
    """Where arrays lie: on a mesh whose devices share batches, maybe of several processes.

    What is on the devices of other processes has to be made part by part, or by a program.

    Args:
      mesh: of all devices.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self.by_examples = NamedSharding(mesh, PartitionSpec(_AXIS))

    def rounded(self, size: int) -> int:
        """Return the next number of examples that the devices can share."""
        return -(-size // self._mesh.size) * self._mesh.size

    def of_state(self, tx: Any, params: Any) -> Any:
        """Return the shardings of a method's state, whose factors may rest in parts."""
        return optalr.state_shardings(tx, params, self._mesh, param_shardings=PartitionSpec())

    def key(self, seed: int) -> jax.Array:
        """Return a random key, on every device."""
        return jax.jit(functools.partial(jax.random.key, seed), out_shardings=self.everywhere)()

    def whole(self, array: np.ndarray) -> jax.Array:
        """Return an array that every device has."""
        return _made(array.shape, self.everywhere, lambda index: array[index])

    def shared(self, array: np.ndarray) -> Any:
        """Return an array of which each device has its rows."""
        return _made(array.shape, self.by_examples, lambda index: array[index])

    def examples(self, split: Split, chosen: np.ndarray) -> tuple[Any, Any]:
        """Return the examples chosen, each device its share; a process reads those of its own."""

        @functools.cache
        def take(start: int | None, stop: int | None) -> Split:
            return split.take(chosen[start:stop])

        def of(index: Any) -> Split:
            return take(index[0].start, index[0].stop)

        shapes = [(len(chosen), *array.shape[1:]) for array in (split.x, split.y)]
        x = _made(shapes[0], self.by_examples, lambda index: of(index).x)
        y = _made(shapes[1], self.by_examples, lambda index: of(index).y)
        return x, y


def placement_on(mesh: Mesh | None) -> Placement:
    """Return where arrays lie on a mesh, or on one device."""
    return Placement() if mesh is None else MeshPlacement(mesh)


_made = jax.make_array_from_callback
