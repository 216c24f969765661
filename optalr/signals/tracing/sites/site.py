"""A *site*: one equation of the traced loss that multiplies data by a parameter.

In: the two operands of the measurement, the product's data and its output's cotangent
(``Operands``). Out: the layer's input and output cotangent as rows of features in the leaf's own
order (``Signals``). Each kind of product (``dots``, ``convolutions``, ``hand``) lays them out in
its own way; the Gram products that follow are the same for every layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from optalr.signals.moments import LeafView
from optalr.signals.tracing.jaxprs import extract
from optalr.signals.tracing.sampling import Sampling, Signals
from optalr.signals.tracing.sides import Sides
from optalr.signals.tracing.views import View


class Operands(NamedTuple):
    """The two sides of a product, as they stand in the backward pass.

    Fields:
      data: the product's operand that is no parameter, in its own shape and dtype.
      cotangent: the cotangent of the product.
    """

    data: Any
    cotangent: Any


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


class Product(NamedTuple):
    """An equation that multiplies data by a parameter.

    Fields:
      parent: the jaxpr that holds the equation.
      equation: the equation.
      kernel: which of its inputs is the parameter.
    """

    parent: Any
    equation: Any
    kernel: int

    @property
    def data(self) -> Any:
        """The type (shape, dtype) of the other operand of a product of two."""
        return self.equation.invars[1 - self.kernel].aval


class KernelPart(NamedTuple):
    """What of a product's kernel is one parameter leaf.

    Fields:
      view: how the kernel, or the window of it, looks at the leaf.
      leaf_shape: the leaf's shape.
      window: the part of the kernel that is this leaf, or None for all of it.
    """

    view: View
    leaf_shape: tuple[int, ...]
    window: Window | None = None


# Sites compare by identity: two uses of one layer are two sites, equal in every field.
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """One product of data and a parameter in the traced loss.

    Attributes:
      leaf: index of the parameter leaf.
      origin: the equation, and where it stands.
      view: how the kernel looks at the leaf.
      sides: the leaf's axes by side of the product.
      num_examples: N, the size of the input's first free axis (over all devices of a shard_map
        inside the loss).
      outer_axes: mesh axes of a shard_map around the loss over which the input varies.
      groups: number of feature groups of a convolution, else 1.
    """

    leaf: int
    origin: Product
    view: View
    sides: Sides
    num_examples: int
    outer_axes: tuple[str, ...] = ()
    groups: int = 1

    @property
    def equation(self) -> Any:
        """The traced equation."""
        return self.origin.equation

    @property
    def kernel(self) -> int:
        """Which of the equation's inputs is the parameter."""
        return self.origin.kernel

    @property
    def leaf_view(self) -> LeafView:
        """The leaf's matrix view that this product implies."""
        stack, inputs, outputs = self.sides
        # The side with the leaf's earlier axes gives the rows, so that the view of a plain matrix
        # is the matrix itself, whichever way round it is applied.
        if inputs[0] < outputs[0]:
            return LeafView(stack, inputs, outputs, "rows")
        return LeafView(stack, outputs, inputs, "cols")

    def fits_its_cut(self, leaf_shape: tuple[int, ...]) -> bool:
        """Return whether a part cut out of the leaf is one block of one side's Gram matrix."""
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

    def operand_types(self) -> Operands:
        """Return the types (shape, dtype) of data and cotangent."""
        data, _ = self.operands([var.aval for var in self.equation.invars])
        return Operands(data, self.equation.outvars[0].aval)

    def product(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Return the equation as a function of data and kernel."""
        equation = self.equation
        evaluate = extract(
            self.origin.parent, [equation], inputs=equation.invars, outputs=equation.outvars
        )

        def product(data, kernel):
            operands = (data, kernel) if self.kernel == 1 else (kernel, data)
            return evaluate(*operands)[0]

        return product

    def pull_back(
        self, data: jax.Array, kernel: jax.Array, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the cotangents of data and kernel."""
        # A product is linear in each operand. Its transposes are what jax's own gradient calls, so
        # that gradients beside signals have the same bits as without.
        product = self.product()
        (data_bar,) = jax.linear_transpose(lambda x: product(x, kernel), data)(cotangent)
        (kernel_bar,) = jax.linear_transpose(lambda w: product(data, w), kernel)(cotangent)
        return data_bar, kernel_bar

    def output_view(self) -> View:
        """Return the site's output as a view, with the leaf's axes at the feature dimensions."""
        raise NotImplementedError

    def piece_edges(self, operands: Operands, sampling: Sampling) -> list[int]:
        """Return where to divide the examples if all at once would take much memory, else []."""
        del operands, sampling
        return []

    def piece(self, operands: Operands, start: Any, size: int) -> Operands:
        """Return both sides of ``size`` examples from ``start`` on."""
        raise NotImplementedError

    def signals(self, operands: Operands, take: tuple[Sampling, jax.Array]) -> Signals:
        """Lay out input and cotangent for the Gram products.

        Args:
          operands: the two sides of the product.
          take: which examples and positions to look at, and the uint32 seed that places the sample.
        """
        raise NotImplementedError
