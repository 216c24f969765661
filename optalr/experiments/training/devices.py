"""Several devices that share each batch of a run."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optalr.experiments.configs.config import MeshConfig
from optalr.experiments.errors import ExperimentError

_AXIS = "data"


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh | None:
    """Return the mesh that a config asks for, or None for one device.

    Raises:
      ExperimentError: there are too few devices, or the batch cannot be cut.
    """
    size = config.data
    if not size:
        return None
    if jax.process_count() > 1:
        raise ExperimentError(
            "the runner trains in one process: start it once, or write a loop of your own as "
            "docs/devices.md shows."
        )
    if size > jax.device_count():
        raise ExperimentError(
            f"mesh.data {size} needs {size} devices, and jax sees {jax.device_count()}: lower it, "
            f"or let a CPU stand for several by XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{size}."
        )
    if batch_size % size:
        raise ExperimentError(
            f"train.batch_size {batch_size} is no multiple of mesh.data {size}: each device takes "
            f"as many examples. Set it to {batch_size - batch_size % size or size}."
        )
    devices = jax.devices()[:size]
    return jax.make_mesh((size,), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


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


def everywhere(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device has."""
    return NamedSharding(mesh, PartitionSpec())


def by_examples(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch."""
    return NamedSharding(mesh, PartitionSpec(_AXIS))
