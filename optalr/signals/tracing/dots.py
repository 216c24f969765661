"""Matrix products as layers: dense layers, projections, einsums.

In: a ``dot_general`` of data and a parameter. Out: its site, or ``NotALayer`` with the reason.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.tracing.site import (
    Operands,
    Product,
    Sampling,
    Signals,
    Site,
    features,
    leaf_order,
    sample,
)
from optalr.signals.tracing.views import Atom, NotALayer, View, axes_of, identity_view, matrix_view

# A layer's output has free dimensions of data beside its features. Their atoms get axes from here
# downwards, to be told from those of dimensions that a broadcast adds later (-1, -2, ...).
_DATA_AXES = -100


class _Axes(NamedTuple):
    """The dimensions of a ``dot_general``'s two operands, by what becomes of them.

    Fields:
      batch: the data's batch dimensions.
      free: the data's dimensions that stay.
      contracted: the data's contracted dimensions.
      kernel_batch: the kernel's batch dimensions.
      kernel_free: the kernel's dimensions that stay.
      kernel_contracted: the kernel's contracted dimensions.
    """

    batch: tuple[int, ...]
    free: list[int]
    contracted: tuple[int, ...]
    kernel_batch: tuple[int, ...]
    kernel_free: list[int]
    kernel_contracted: tuple[int, ...]

    @classmethod
    def of(cls, product: Product) -> "_Axes":
        contract, batch = product.equation.params["dimension_numbers"]
        kernel, data = product.kernel, 1 - product.kernel

        def free(operand: int) -> list[int]:
            rank = len(product.equation.invars[operand].aval.shape)
            taken = {*contract[operand], *batch[operand]}
            return [axis for axis in range(rank) if axis not in taken]

        return cls(
            batch[data], free(data), contract[data], batch[kernel], free(kernel), contract[kernel]
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DotSite(Site):
    """A ``dot_general`` of data and a kernel."""

    sums_outer_products: ClassVar[bool] = True

    @property
    def sees_one_vector(self) -> bool:
        """Whether the data has no free dimension of more than one entry, on all devices."""
        shape, free = self.origin.data.shape, _Axes.of(self.origin).free
        return self.num_examples == 1 and all(shape[axis] == 1 for axis in free)

    def output_view(self) -> View:
        """Return the output as a view: the kernel's free dimensions are the features."""
        axes = _Axes.of(self.origin)
        lead = [self.view.dims[axis] for axis in axes.kernel_batch]
        sizes = self.origin.data.shape
        data = [(Atom(_DATA_AXES - axis, 1, sizes[axis]),) for axis in axes.free]
        kernel = [self.view.dims[axis] for axis in axes.kernel_free]
        # ``dot_general`` puts the free dimensions of its first operand first.
        rest = [*kernel, *data] if self.kernel == 0 else [*data, *kernel]
        shape = self.equation.outvars[0].aval.shape
        return identity_view(self, shape).with_dims([*lead, *rest])

    def extent(self) -> tuple[int, int]:
        """Return the data's first free dimension, which counts examples, and the others."""
        shape = self.origin.data.shape
        free = [shape[axis] for axis in _Axes.of(self.origin).free]
        return (free[0], math.prod(free[1:])) if free else (1, 1)

    def example_axes(self) -> tuple[int, int] | None:
        """Return the data's first free axis, and its place in the cotangent."""
        axes = _Axes.of(self.origin)
        if not axes.free:
            return None
        return axes.free[0], len(axes.batch) + (len(axes.kernel_free) if self.kernel == 0 else 0)

    def signals(self, operands: Operands, take: tuple[Sampling, jax.Array]) -> Signals:
        """Lay out both sides, one row an entry of the data's free dimensions."""
        axes = _Axes.of(self.origin)
        num_batch, lead = len(axes.batch), len(axes.batch) + len(axes.free)
        data, cotangent = self._cut_window(self._data_first(operands, axes), axes)
        dims = self.view.dims
        data = features(data, lead, [dims[axis] for axis in axes.kernel_contracted])
        cotangent = features(cotangent, lead, [dims[axis] for axis in axes.kernel_free])
        stack = math.prod(data.shape[:num_batch])
        # Of the operands at hand, which may be some of the examples.
        examples = data.shape[num_batch] if axes.free else 1
        data = data.reshape(stack, examples, -1, data.shape[-1])
        cotangent = cotangent.reshape(stack, examples, -1, cotangent.shape[-1])
        if num_batch > 1:
            atoms = [dims[axis][0] for axis in axes.kernel_batch]
            data = _stack_in_leaf_order(data, atoms)
            cotangent = _stack_in_leaf_order(cotangent, atoms)
        return sample(data, cotangent, take)

    def _data_first(self, operands: Operands, axes: _Axes) -> Operands:
        """Bring batch dimensions to the front, then free ones of the data, then the features."""
        num_batch, num_free = len(axes.batch), len(axes.free)
        data = jnp.transpose(operands.data, (*axes.batch, *axes.free, *axes.contracted))
        out_free = tuple(range(num_batch, num_batch + num_free))
        if self.kernel == 0:
            out_free = tuple(axis + len(axes.kernel_free) for axis in out_free)
        rank = operands.cotangent.ndim
        out_kernel = [axis for axis in range(num_batch, rank) if axis not in out_free]
        order = (*range(num_batch), *out_free, *out_kernel)
        return Operands(data, jnp.transpose(operands.cotangent, order))

    def _cut_window(self, operands: Operands, axes: _Axes) -> Operands:
        """Keep the features that belong to this leaf."""
        if self.origin.window is None:
            return operands
        axis, start, size = self.origin.window
        lead = len(axes.batch) + len(axes.free)
        data, cotangent = operands
        if axis in axes.kernel_contracted:
            place = lead + list(axes.kernel_contracted).index(axis)
            data = jax.lax.slice_in_dim(data, start, start + size, axis=place)
        else:
            place = lead + axes.kernel_free.index(axis)
            cotangent = jax.lax.slice_in_dim(cotangent, start, start + size, axis=place)
        return Operands(data, cotangent)


def _stack_in_leaf_order(array: jax.Array, atoms: list[Atom]) -> jax.Array:
    """Put the flattened batch dimensions of the kernel into the leaf's order."""
    sizes = [atom.size for atom in atoms]
    rest = (len(sizes) + i for i in range(3))
    stacked = array.reshape(*sizes, *array.shape[1:])
    return jnp.transpose(stacked, (*leaf_order(atoms), *rest)).reshape(array.shape)


def dot_site(product: Product) -> Site:
    """Return the site of a ``dot_general``.

    Raises:
      NotALayer: the product is no layer.
    """
    axes, view = _Axes.of(product), product.view
    stack = [atom for axis in axes.kernel_batch for atom in view.dims[axis]]
    # Each batch dimension must be one axis of the leaf, or the stack is no stack of its slices.
    single = all(len(view.dims[axis]) == 1 for axis in axes.kernel_batch)
    if not single or len(axes_of(stack)) != len(axes.kernel_batch):
        raise NotALayer("stacked along part of an axis")
    if product.window is not None and product.window.axis in axes.kernel_batch:
        raise NotALayer("concatenated along a batch dimension of its product")
    leaf_view = matrix_view(
        product.leaf_shape,
        view,
        stack=stack,
        inputs=[atom for axis in axes.kernel_contracted for atom in view.dims[axis]],
        outputs=[atom for axis in axes.kernel_free for atom in view.dims[axis]],
    )
    examples = product.data.shape[axes.free[0]] if axes.free else 1
    return DotSite(origin=product, leaf_view=leaf_view, num_examples=examples)
