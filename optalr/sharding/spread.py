"""Over which devices work is spread: a mesh, and some of its axes."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # gone by jax 0.12
    shard_alike = None


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mesh, and the axes of it that share work out.

    Attributes:
      mesh: of devices, or an abstract one where programs are only lowered.
      axes: names of axes, the slowest first; None for all. Devices that differ along another axis
        alone do the same work.
      rests: whether each device keeps a share of every matrix, and not all of it.

    Raises:
      TypeError: ``mesh`` is no mesh.
      ValueError: the mesh has no such axis, or there is none, or one twice.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...] | None = None
    rests: bool = False

    def __post_init__(self):
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            # A mesh is callable (as a decorator), which inject_hyperparams takes for a schedule.
            raise TypeError(
                "mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)), got "
                f"{self.mesh!r}. Under optax.inject_hyperparams pass static_args=('mesh',)."
            )
        known = set(self.mesh.axis_names)
        if not self.names or len({*self.names} & known) < len(self.names):
            raise ValueError(
                f"mesh_axes must be axes of the mesh, {self.mesh.axis_names}, each once, got "
                f"{self.axes!r}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The axes that share work out."""
        return self.mesh.axis_names if self.axes is None else self.axes

    @property
    def num_devices(self) -> int:
        """How many shares there are."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return how matrices ``(..., n, n)`` rest that are shared out.

        They are cut along the first axis that can be: that of the stack, if the number of devices
        divides it, else that of the rows. What cannot be cut, or is no matrix, is replicated.
        """
        axis = self.axis_of(shape)
        return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, self.names)

    def axis_of(self, shape: tuple[int, ...]) -> int | None:
        """Return the axis along which matrices ``(..., n, n)`` are cut at rest, or None."""
        fitting = [axis for axis, n in enumerate(shape[:-1]) if n % self.num_devices == 0]
        return fitting[0] if self.rests and fitting else None

    def at_rest(self, tree: Any) -> Any:
        """Return matrices as they rest."""
        mesh = self.at_hand() if self.rests else None
        if mesh is None:
            return tree

        def place(array: jax.Array) -> jax.Array:
            spec = self.spec(array.shape)
            if _is_explicit(mesh):
                return jax.sharding.reshard(array, spec)
            return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

        return jax.tree.map(place, tree)

    def follow(self, updates: Any, params: Any) -> Any:
        """Return updates sharded as their parameters are, where matrices rest in parts.

        The compiler would choose for the products of a matrix's rows, and hand the choice on to the
        parameters. On explicit axes and inside a ``shard_map`` it has no choice. Inside control
        flow it chooses all the same: shardings do not pass through. So it does where jax has no
        ``shard_alike``; ``out_shardings`` of the step then decide.
        """
        mesh = self.at_hand() if self.rests and params is not None else None
        if (
            shard_alike is None
            or mesh is None
            or any(map(_is_explicit, [mesh, *jax.tree.leaves(updates)]))
        ):
            return updates
        return shard_alike(updates, params)[0]

    def at_hand(self) -> Mesh | AbstractMesh | None:
        """Return the mesh as the code at hand sees it; None inside a ``shard_map``.

        There each device runs a program of its own already, and a second map over the same axes is
        impossible.

        Raises:
          ValueError: the context, from ``jax.set_mesh``, has another mesh.
        """
        context = jax.sharding.get_abstract_mesh()
        if context.empty:
            return _on_auto_axes(self.mesh)
        if dict(context.shape) != dict(self.mesh.shape):
            raise ValueError(
                f"mesh must be the one of jax.set_mesh, {dict(context.shape)}, got "
                f"{dict(self.mesh.shape)}. Make the optimizer and set the mesh with the same."
            )
        return None if AxisType.Manual in context.axis_types else context


def spread_over(mesh: Any, axes: Any, *, rests: bool = False) -> Spread | None:
    """Return what ``mesh``, ``mesh_axes`` and ``sharded_factors`` stand for; None without a mesh.

    Raises:
      TypeError: ``mesh`` is no mesh, or ``mesh_axes`` are no names.
      ValueError: the mesh has no such axis, or there are other arguments and no mesh.
    """
    if axes is not None:
        axes = (axes,) if isinstance(axes, str) else axes
        if not isinstance(axes, list | tuple) or not all(isinstance(name, str) for name in axes):
            raise TypeError(f"mesh_axes must be names of the mesh's axes, got {axes!r}.")
        axes = tuple(axes)
    if mesh is None:
        if axes is not None:
            raise ValueError(f"mesh_axes={axes!r} are axes of a mesh. Pass mesh= as well.")
        if rests:
            raise ValueError("sharded_factors=True needs a mesh to shard over. Pass mesh= as well.")
        return None
    return Spread(mesh, axes, bool(rests))


def spread_of_batch(batch_sharding: Any) -> Spread | None:
    """Return the devices that share the examples of a batch; None where nothing is given.

    Raises:
      TypeError: it is no ``NamedSharding``.
      ValueError: it does not shard the first axis.
    """
    if batch_sharding is None:
        return None
    if not isinstance(batch_sharding, NamedSharding):
        raise TypeError(
            "batch_sharding must be a NamedSharding, such as jax.NamedSharding(mesh, "
            f"jax.P('data')), got {batch_sharding!r}."
        )
    first, *_ = (*batch_sharding.spec, None)
    if first is None:
        raise ValueError(
            "batch_sharding must shard the first axis, that of the examples, as jax.P('data') "
            f"does, got {batch_sharding.spec}."
        )
    names = (first,) if isinstance(first, str) else tuple(first)
    return Spread(batch_sharding.mesh, names, rests=True)


def _is_explicit(mesh_or_array: Any) -> bool:
    """Return whether a mesh, or that of an array, has explicit axes."""
    mesh = mesh_or_array
    if not isinstance(mesh, Mesh | AbstractMesh):
        mesh = jax.typeof(mesh_or_array).sharding.mesh
    return AxisType.Explicit in mesh.axis_types


def _on_auto_axes(mesh: Any) -> Any:
    """Return a mesh without explicit axes, which no array at hand is on."""
    axis_types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return mesh.update(axis_types=axis_types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)
