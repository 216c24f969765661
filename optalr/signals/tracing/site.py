"""A *site*: one equation of the traced loss that multiplies data by a parameter.

In: the two operands of the measurement, the product's data and its output's cotangent
(``Operands``). Out: the layer's input and output cotangent as rows of features in the leaf's own
order (``Signals``), of all examples and positions or of a sample of them (``Sampling``). Each kind
of product (``dots``, ``convolutions``, ``hand``) lays them out in its own way; the Gram products
that follow are the same for every layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optalr.signals.moments import LeafView
from optalr.signals.tracing.jaxprs import extract
from optalr.signals.tracing.sampling import comb, pick, scatter
from optalr.signals.tracing.views import Atom, Stretch, View


class Operands(NamedTuple):
    """The two sides of a product, as they stand in the backward pass.

    Fields:
      data: the product's operand that is no parameter, in its own shape and dtype.
      cotangent: the cotangent of the product.
    """

    data: Any
    cotangent: Any


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How much of a batch a measurement looks at.

    Attributes:
      every: look at one example in ``every``.
      max_positions: look at no more than this many positions of an example; None for all.
      max_rows: look at no more than this many positions of all examples together; None for all.
    """

    every: int = 1
    max_positions: int | None = None
    max_rows: int | None = None

    def counts(self, examples: int, positions: int) -> tuple[int, int]:
        """Return how many of these examples and positions a measurement looks at."""
        keep_examples = max(1, examples // self.every)
        keep_positions = positions
        if self.max_positions is not None:
            keep_positions = min(positions, self.max_positions)
        if self.max_rows is not None:
            # Positions go first: those of one example resemble each other.
            keep_examples = min(keep_examples, self.max_rows)
            keep_positions = min(keep_positions, self.max_rows // keep_examples)
        return keep_examples, keep_positions

    def of_each(self, number: int) -> "Sampling":
        """Return a sample for each of so many equal parts of the examples."""
        if self.max_rows is None:
            return self
        return dataclasses.replace(self, max_rows=max(1, self.max_rows // number))

    def stretched(self, factor: float) -> "Sampling":
        """Return a sample of so many times the rows, where their number is limited."""
        if self.max_rows is None:
            return self
        return dataclasses.replace(self, max_rows=max(1, int(factor * self.max_rows)))

    def share(self, examples: int, positions: int) -> float:
        """Return which part of these a measurement looks at."""
        keep_examples, keep_positions = self.counts(examples, positions)
        return keep_examples * keep_positions / (examples * positions)


class Signals(NamedTuple):
    """The two sides of a layer, laid out for the Gram products.

    With S layers in the stack, R rows of inputs and R' of outputs (a convolution's groups count as
    rows of the inputs):

    Fields:
      inputs: ``(S, R, m)`` what went into the layer.
      outputs: ``(S, R', n)`` the cotangents of what came out.
      scale: by how much a sum over the rows of outputs must be multiplied to estimate the sum over
        all positions of all examples.
    """

    inputs: jax.Array
    outputs: jax.Array
    scale: float


class Product(NamedTuple):
    """An equation that multiplies data by a parameter.

    Fields:
      parent: the jaxpr that holds the equation.
      equation: the equation.
      kernel: which of its inputs is the parameter.
      view: how the kernel, or the window of it, looks at the leaf.
      leaf_shape: the leaf's shape.
      window: which part of a kernel joined of several leaves is this one; None for all of it.
    """

    parent: Any
    equation: Any
    kernel: int
    view: View
    leaf_shape: tuple[int, ...]
    window: Stretch | None = None

    @property
    def data(self) -> Any:
        """The type (shape, dtype) of the other operand of a product of two."""
        return self.equation.invars[1 - self.kernel].aval


class Sums(NamedTuple):
    """Sums over all positions of all uses of one leaf, not yet divided by their number.

    With ``stack`` the sizes of the leaf's stacked axes:

      inputs:  ``(*stack, m, m)`` Σ α αᵀ, averaged over a convolution's groups
      outputs: ``(*stack, n, n)`` Σ c cᵀ over cotangents c of the layer's output
      mean:    ``(*stack, m)``    Σ α
      total:   ``(*stack,)``      the number of positions, NT
    """

    inputs: Any
    outputs: Any
    mean: Any
    total: Any


# Sites compare by identity: two uses of one layer are two sites, equal in every field.
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """One product of data and a parameter in the traced loss.

    Attributes:
      origin: the equation, and what of its kernel is the leaf.
      leaf_view: the leaf's matrix view that the product implies.
      num_examples: N, the size of the input's first free axis (over all devices of a shard_map
        inside the loss).
      outer_axes: mesh axes of a shard_map around the loss over which the input varies.
      groups: number of feature groups of a convolution, else 1.
      by_hand: whether the user declared the layer.
      sums_outer_products: whether the leaf's gradient is the sum over the rows of ``signals``.
    """

    origin: Product
    leaf_view: LeafView
    num_examples: int
    outer_axes: tuple[str, ...] = ()
    groups: int = 1
    by_hand: ClassVar[bool] = False
    sums_outer_products: ClassVar[bool] = False

    @property
    def equation(self) -> Any:
        """The traced equation."""
        return self.origin.equation

    @property
    def kernel(self) -> int:
        """Which of the equation's inputs is the parameter."""
        return self.origin.kernel

    @property
    def view(self) -> View:
        """How the kernel looks at the leaf."""
        return self.origin.view

    @property
    def leaf(self) -> int:
        """The index of the parameter leaf."""
        return self.view.source

    @property
    def sees_one_vector(self) -> bool:
        """Whether there is one vector of inputs in all, and not a batch of them."""
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

    def gain(self, numbers: Iterator[Any]) -> jax.Array | None:
        """Return the product of the leaf's scales, whose values come next; None if it has none."""
        gain = None
        for scale, number in zip(self.view.scales, numbers, strict=False):
            factor = jnp.reshape(1 / number if scale.divides else number, ())
            gain = factor if gain is None else gain * factor
        return gain

    def output_view(self) -> View:
        """Return the site's output as a view, with the leaf's axes at the feature dimensions."""
        raise NotImplementedError

    def extent(self) -> tuple[int, int]:
        """Return how many examples the product sees, and how many positions of each."""
        raise NotImplementedError

    def example_axes(self) -> tuple[int, int] | None:
        """Return which axis of data and cotangent counts examples; None where none does."""
        raise NotImplementedError

    def add_up(
        self, measure: Callable[[Operands], Sums], operands: Operands, sampling: Sampling
    ) -> Sums:
        """Return what is summed over the examples, by ``measure`` of all or of pieces of them."""
        del sampling
        return measure(operands)

    def signals(self, operands: Operands, take: tuple[Sampling, jax.Array]) -> Signals:
        """Lay out both sides of the product for the Gram products.

        ``take`` says which examples and positions, with the uint32 seed that places the sample.
        """
        raise NotImplementedError


def leaf_order(atoms: Sequence[Atom]) -> list[int]:
    """Return the permutation that puts ``atoms`` into the leaf's own (row-major) order."""
    return sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))


def features(array: jax.Array, lead: int, dims: Sequence[tuple[Atom, ...]]) -> jax.Array:
    """Flatten the dimensions after the first ``lead`` into features in the leaf's order."""
    # A product may contract axes in any order, while a Gram matrix is read in the leaf's.
    atoms = [atom for dim in dims for atom in dim]
    order = leaf_order(atoms)
    array = array.reshape(*array.shape[:lead], *(atom.size for atom in atoms))
    array = jnp.transpose(array, (*range(lead), *(lead + i for i in order)))
    return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))


def sample(inputs: jax.Array, outputs: jax.Array, take: tuple[Sampling, jax.Array]) -> Signals:
    """Pick examples and positions of ``(stack, examples, positions, features)``; flatten them.

    Args:
      inputs: the input's side.
      outputs: the output's side, with the same axes but the last.
      take: how much to look at, and a uint32 scalar that decides where.
    """
    sampling, seed = take
    stack, examples, positions, _ = inputs.shape
    keep_examples, keep_positions = sampling.counts(examples, positions)
    if keep_examples < examples:
        index = comb(examples, keep_examples, seed)
        inputs, outputs = pick(inputs, index, 1), pick(outputs, index, 1)
    if keep_positions < positions:
        # Another seed, or the place in the image would follow from the example.
        index = scatter(positions, keep_positions, spread(seed))
        inputs, outputs = pick(inputs, index, 2), pick(outputs, index, 2)
    scale = examples * positions / (keep_examples * keep_positions)
    rows = keep_examples * keep_positions
    return Signals(inputs.reshape(stack, rows, -1), outputs.reshape(stack, rows, -1), scale)


def spread(seed: jax.Array) -> jax.Array:
    """Mix the bits of a uint32, and return 24 that depend on all of them."""
    # Multiplying by 2³²/φ carries low bits into high ones (Knuth's multiplicative hashing).
    return (seed * np.uint32(0x9E3779B1)) >> np.uint32(8)
