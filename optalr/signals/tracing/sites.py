"""The products that make a layer, and how to lay out the two sides of each.

A *site* is one equation of the traced loss that multiplies data by a parameter. It knows how to
lay out the product's input and output cotangent as ``(stack, examples, positions, features)``,
features in the leaf's own order; the rest is the same for every layer.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.moments import LeafView
from optalr.signals.tapping.hand import split_axis
from optalr.signals.tracing.jaxprs import extract
from optalr.signals.tracing.sampling import Sampling, sample
from optalr.signals.tracing.views import (
    Atom,
    Dims,
    Sides,
    View,
    axes_of,
    leaf_order,
    split_sides,
    whole,
)


class Window(NamedTuple):
    """Which part of a product belongs to a leaf whose kernel was concatenated with others.

    Fields:
      axis: the kernel operand's dimension along which the kernels follow one another.
      start: where this leaf begins.
      size: how far it goes.
    """

    axis: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One product of data and a parameter in the traced loss.

    Attributes:
      leaf: index of the parameter leaf.
      parent: the jaxpr that holds the equation.
      equation: the traced equation.
      kernel: which operand of the equation is the parameter, 0 or 1 (a hand tap: how many of the
        kernel's axes come before the split between its two sides).
      view: how that operand looks at the leaf.
      sides: the leaf's axes by side of the product.
      num_examples: N, the size of the input's first free axis (over all devices of a shard_map
        inside the loss).
      groups: number of feature groups of a convolution, else 1.
      outer_axes: mesh axes of a shard_map around the loss over which the input varies.
      stacked: number of layers that a ``vmap`` made the groups of one convolution, else 1.
      window: the part of the kernel operand that is this leaf, or None for all of it.
    """

    leaf: int
    parent: Any
    equation: Any
    kernel: int
    view: View
    sides: Sides
    num_examples: int
    groups: int = 1
    outer_axes: tuple[str, ...] = ()
    stacked: int = 1
    window: Window | None = None

    @property
    def leaf_view(self) -> LeafView:
        """The leaf's matrix view that this product implies."""
        stack, inputs, outputs = self.sides
        if inputs[0] < outputs[0]:
            return LeafView(stack, inputs, outputs, "rows")
        return LeafView(stack, outputs, inputs, "cols")

    def fits_its_cut(self, leaf_shape: tuple[int, ...]) -> bool:
        """Whether a part cut out of the leaf is one block of one side's Gram matrix."""
        if self.view.cut is None:
            return True
        axis = self.view.cut.axis
        for side in (self.sides.inputs, self.sides.outputs):
            if axis in side:
                return all(leaf_shape[other] == 1 for other in side if other != axis)
        return False

    def operands(self, values: Sequence[Any]) -> tuple[Any, Any]:
        """Return data and kernel among the equation's inputs."""
        return values[1 - self.kernel], values[self.kernel]

    def product(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the equation as a function of data and kernel."""
        inputs = self.equation.invars
        evaluate = extract(self.parent, [self.equation], inputs, self.equation.outvars)

        def product(data, kernel):
            operands = (data, kernel) if self.kernel == 1 else (kernel, data)
            return evaluate(*operands)[0]

        return product

    def pull_back(
        self, data: jax.Array, kernel: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the cotangents of data and kernel."""
        product = self.product()
        (data_bar,) = jax.linear_transpose(lambda x: product(x, kernel), data)(cotangent)
        (kernel_bar,) = jax.linear_transpose(lambda w: product(data, w), kernel)(cotangent)
        return data_bar, kernel_bar

    def output_view(self) -> View:
        """Return the site's output as a view, with the leaf's axes at the feature dimensions."""
        raise NotImplementedError

    def piece_edges(self, data: Any, cotangent: Any, sampling: Sampling) -> list[int] | None:
        """Return where to divide the examples, as all at once would take much memory, or None."""
        del data, cotangent, sampling

    def piece(
        self, data: jax.Array, cotangent: jax.Array, start: Any, size: int
    ) -> tuple[jax.Array, jax.Array]:
        """Return both sides of ``size`` examples from ``start`` on."""
        raise NotImplementedError

    def signals(
        self, data: jax.Array, cotangent: jax.Array, sampling: Sampling, seed: jax.Array
    ) -> tuple[jax.Array, jax.Array, float]:
        """Lay out input and cotangent for the Gram products.

        Args:
          data: the product's other operand.
          cotangent: the cotangent of the product.
          sampling: which examples and positions to look at.
          seed: uint32 scalar that places the sample.

        Returns:
          The inputs ``(S, R, m)``, the cotangents ``(S, R', n)``, and by how much the sum over the
          sampled cotangents must be multiplied to estimate the sum over all.
        """
        raise NotImplementedError


def features(array: jax.Array, lead: int, dims: Sequence[tuple[Atom, ...]]) -> jax.Array:
    """Flatten the dimensions after the first ``lead`` into features in the leaf's order."""
    atoms = [atom for dim in dims for atom in dim]
    order = leaf_order(atoms)
    array = array.reshape(*array.shape[:lead], *(atom.size for atom in atoms))
    array = jnp.transpose(array, (*range(lead), *(lead + i for i in order)))
    return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))


class DotSite(Site):
    """A ``dot_general`` of data and a kernel: dense layers, projections, einsums."""

    # Signatures and meaning of the public methods: see Site.

    @property
    def _axes(self) -> tuple[Any, ...]:
        contract, batch = self.equation.params["dimension_numbers"]
        data = 1 - self.kernel
        rank = len(self.equation.invars[data].aval.shape)
        free = [a for a in range(rank) if a not in contract[data] and a not in batch[data]]
        kernel_free = [
            axis
            for axis in range(len(self.view.shape))
            if axis not in contract[self.kernel] and axis not in batch[self.kernel]
        ]
        return batch[data], free, contract[data], kernel_free

    def output_view(self) -> View:
        _, free, _, kernel_free = self._axes
        shape = self.equation.outvars[0].aval.shape
        lead = [self.view.dims[axis] for axis in _kernel_batch(self.equation, self.kernel)]
        data = [
            (Atom(-100 - axis, 1, self.equation.invars[1 - self.kernel].aval.shape[axis]),)
            for axis in free
        ]
        kernel = [self.view.dims[axis] for axis in kernel_free]
        rest = [*kernel, *data] if self.kernel == 0 else [*data, *kernel]
        return whole(self, shape).with_dims([*lead, *rest])

    def signals(self, data, cotangent, sampling, seed):
        batch, free, contract, kernel_free = self._axes
        contract_kernel = self.equation.params["dimension_numbers"][0][self.kernel]
        num_batch, num_free = len(batch), len(free)
        data = jnp.transpose(data, (*batch, *free, *contract))
        out_free = tuple(range(num_batch, num_batch + num_free))
        if self.kernel == 0:
            out_free = tuple(axis + len(kernel_free) for axis in out_free)
        out_kernel = [axis for axis in range(num_batch, cotangent.ndim) if axis not in out_free]
        cotangent = jnp.transpose(cotangent, (*range(num_batch), *out_free, *out_kernel))
        lead = num_batch + num_free
        if self.window is not None:
            axis, start, size = self.window
            if axis in contract_kernel:
                place = lead + list(contract_kernel).index(axis)
                data = jax.lax.slice_in_dim(data, start, start + size, axis=place)
            else:
                place = lead + kernel_free.index(axis)
                cotangent = jax.lax.slice_in_dim(cotangent, start, start + size, axis=place)
        data = features(data, lead, [self.view.dims[axis] for axis in contract_kernel])
        cotangent = features(cotangent, lead, [self.view.dims[axis] for axis in kernel_free])
        stack = math.prod(data.shape[:num_batch])
        free_shape = data.shape[num_batch:lead]
        examples = free_shape[0] if free_shape else 1
        positions = math.prod(free_shape[1:])
        data = data.reshape(stack, examples, positions, data.shape[-1])
        cotangent = cotangent.reshape(stack, examples, positions, cotangent.shape[-1])
        if num_batch > 1:  # the kernel's batch dimensions, into the leaf's order
            atoms = [self.view.dims[a][0] for a in _kernel_batch(self.equation, self.kernel)]
            order = leaf_order(atoms)
            sizes = [atom.size for atom in atoms]
            data, cotangent = (
                jnp.transpose(
                    array.reshape(*sizes, *array.shape[1:]),
                    (*order, *(len(sizes) + i for i in range(3))),
                ).reshape(array.shape)
                for array in (data, cotangent)
            )
        return sample(data, cotangent, sampling, seed)


class HandSite(Site):
    """A layer that the user declared with ``tap_layer``; its product is the identity on outputs.

    The equation's inputs are outputs ``(N, ..., n, 1)``, inputs ``(N, ..., m, 1)`` and the kernel.
    """

    def operands(self, values):
        return values[1], values[0]

    def product(self):
        return lambda data, outputs: outputs

    def pull_back(self, data, kernel, cotangent):
        return jnp.zeros_like(data), cotangent

    def output_view(self) -> View:
        shape = self.equation.outvars[0].aval.shape
        lead = [(Atom(-1 - axis, 1, size),) for axis, size in enumerate(shape[:-2])]
        features = tuple(atom for dim in self._sides[1] for atom in dim)
        return whole(self, shape).with_dims([*lead, features, ()])

    @property
    def _sides(self) -> tuple[Dims, Dims]:
        """The kernel's dimensions on the input's side and on the output's."""
        first, last = self.view.dims[: self.kernel], self.view.dims[self.kernel :]
        rows = self.equation.params["name"].endswith("rows")
        return (first, last) if rows else (last, first)

    def signals(self, data, cotangent, sampling, seed):
        inputs, outputs = self._sides
        lead = data.ndim - 2
        data = features(data, lead, inputs)
        cotangent = features(cotangent, lead, outputs)
        examples = data.shape[0] if lead else 1
        data = data.reshape(1, examples, -1, data.shape[-1])
        cotangent = cotangent.reshape(1, examples, -1, cotangent.shape[-1])
        return sample(data, cotangent, sampling, seed)


def _kernel_batch(equation: Any, kernel: int) -> tuple[int, ...]:
    return equation.params["dimension_numbers"][1][kernel]


def dot_site(
    parent: Any,
    equation: Any,
    kernel: int,
    view: View,
    leaf_shape: tuple[int, ...],
    window: Window | None = None,
) -> Site | str:
    """Return the site of a ``dot_general`` whose operand ``kernel`` is a parameter.

    Args:
      parent: the jaxpr that holds the equation.
      equation: the equation.
      kernel: which operand is the parameter.
      view: how the operand, or the window of it, looks at the leaf.
      leaf_shape: the leaf's shape.
      window: the part of the operand that is this leaf, or None for all of it.

    Returns:
      The site, or a sentence that says why the product is no layer.
    """
    contract, batch = equation.params["dimension_numbers"]
    stack = [atom for axis in batch[kernel] for atom in view.dims[axis]]
    inputs = [atom for axis in contract[kernel] for atom in view.dims[axis]]
    outputs = [
        atom
        for axis, dim in enumerate(view.dims)
        if axis not in contract[kernel] and axis not in batch[kernel]
        for atom in dim
    ]
    if any(len(view.dims[axis]) != 1 for axis in batch[kernel]) or len(set(axes_of(stack))) != len(
        batch[kernel]
    ):
        return "stacked along part of an axis"
    if window is not None and window.axis in batch[kernel]:
        return "concatenated along a batch dimension of its product"
    sides = split_sides(len(leaf_shape), view.scanned, stack, inputs, outputs)
    if isinstance(sides, str):
        return sides
    data = equation.invars[1 - kernel].aval
    free = [
        axis
        for axis in range(len(data.shape))
        if axis not in contract[1 - kernel] and axis not in batch[1 - kernel]
    ]
    num_examples = data.shape[free[0]] if free else 1
    leaf = int(view.source)
    return DotSite(leaf, parent, equation, kernel, view, sides, num_examples, window=window)


def hand_site(parent: Any, equation: Any, view: View, leaf_shape: tuple[int, ...]) -> Site | str:
    """Return the site of a ``tap_layer``, or why its kernel is none of the leaf's matrices."""
    outputs, inputs = (var.aval.shape for var in equation.invars[:2])
    m, n = inputs[-2], outputs[-2]
    rows = equation.params["name"].endswith("rows")
    split = split_axis(view.shape, *((m, n) if rows else (n, m)))
    if split is None:
        return "tapped by hand under a vmap over the kernel"
    first = [atom for dim in view.dims[:split] for atom in dim]
    last = [atom for dim in view.dims[split:] for atom in dim]
    pair = (first, last) if rows else (last, first)
    sides = split_sides(len(leaf_shape), view.scanned, (), *pair)
    if isinstance(sides, str):
        return sides
    num_examples = inputs[0] if len(inputs) > 2 else 1
    # ``kernel`` holds where the kernel's axes divide into the two sides.
    return HandSite(int(view.source), parent, equation, split, view, sides, num_examples)
