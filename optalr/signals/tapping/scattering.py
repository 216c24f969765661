"""Sums over a batch that is shared over a mesh: each device adds up its own examples.

Of a Gram matrix a device then gets some rows, summed over all devices (a reduce-scatter), and never
the whole. The compiler alone would make the whole on every device, and cut the rows out of it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optalr.sharding.spread import Spread
from optalr.signals.moments import FactorStorage, Form
from optalr.signals.tracing.jaxprs import varying_axes
from optalr.signals.tracing.site import Operands, Site, Sums


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Who shares the examples of a batch, and what they may keep in parts.

    Attributes:
      spread: the devices.
      storage: what will be kept of Gram matrices; None for all that is measured. Blocks of a matrix
        whose rows lie on different devices would have to be gathered.
    """

    spread: Spread
    storage: FactorStorage | None

    def num_parts(self, site: Site) -> int:
        """Return over how many devices the examples of a site are shared out.

        It is 1 where the devices do not divide the examples, and inside a ``shard_map``.
        """
        types, axes, (examples, _) = site.operand_types(), site.example_axes(), site.extent()
        if axes is None or examples % self.spread.num_devices:
            return 1
        # A shard_map inside the loss is over by the time that what it gathered is read.
        if varying_axes(types.data) or self.spread.at_hand() is None:
            return 1
        fits = all(map(self._may_share, types, axes))
        return self.spread.num_devices if fits else 1

    def specs(self, like: Sums, kept: tuple[Form, Form]) -> Sums:
        """Return how sums lie: of a Gram matrix, or of blocks of one, each device has some rows."""

        def spec(gram: Any, form: Form) -> PartitionSpec:
            # Not some layers of a stack: a scan makes these one by one.
            stack = len(like.total.shape)
            axis = self.spread.axis_of(gram.shape[stack:])
            if axis is None or not (
                self.storage is None or self.storage.side(form.size).is_like(form)
            ):
                return PartitionSpec()
            return self._spec(stack + axis)

        rows = spec(like.inputs, kept[0]), spec(like.outputs, kept[1])
        return Sums(rows[0], rows[1], PartitionSpec(), PartitionSpec())

    def typed(self, like: Sums, kept: tuple[Form, Form], site: Site) -> Sums:
        """Return the shapes of sums, on explicit axes with how they lie."""
        mesh = site.operand_types().data.sharding.mesh
        if AxisType.Explicit not in mesh.axis_types or self.num_parts(site) == 1:
            return like

        def with_sharding(shape: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        return jax.tree.map(with_sharding, like, self.specs(like, kept))

    def add_up(
        self, measure: Callable[[Operands], Sums], operands: Operands, site: Site, *, specs: Sums
    ) -> Sums:
        """Return the sums that ``measure`` makes of each device's examples, added up over all.

        Args:
          measure: what a device does with its examples.
          operands: the two sides of a product.
          site: the product, whose examples have ``num_parts``.
          specs: how the sums lie.
        """
        names = self.spread.names

        def of_device(operands: Operands) -> Sums:
            own = measure(operands)
            inputs, outputs, mean, _ = jax.tree.map(partial(_over_devices, names), own, specs)
            # Every device has seen as many positions.
            return Sums(inputs, outputs, mean, own.total * self.spread.num_devices)

        return jax.shard_map(
            of_device,
            mesh=self.spread.at_hand(),
            in_specs=(Operands(*map(self._spec, site.example_axes() or ())),),
            out_specs=specs,
            axis_names=set(names),
            check_vma=False,
        )(operands)

    def _may_share(self, operand: Any, axis: int) -> bool:
        """Return whether the devices may share out an axis: where it is explicit, they must."""
        sharding = operand.sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return True
        names = sharding.spec[axis]
        return (names if isinstance(names, tuple) else (names,)) == self.spread.names

    def _spec(self, axis: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * axis, self.spread.names)


def _over_devices(names: tuple[str, ...], array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return a sum over devices, or of a part of it the part that a device is to have."""
    if not len(spec):
        return jax.lax.psum(array, names)
    return jax.lax.psum_scatter(array, names, scatter_dimension=len(spec) - 1, tiled=True)
