"""Which axes of a leaf stand on which side of its product.

In: the atoms of a product's stacked, contracted and free dimensions. Out: the leaf's axes by side
(``Sides``), from which its matrix view follows; or ``NotALayer``, with the reason why the leaf is
no matrix here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optalr.signals.tracing.views import Atom


class NotALayer(Exception):  # noqa: N818  (an answer, not an error)
    """A product of data and a parameter is no layer; the message is the reason to report."""


class Sides(NamedTuple):
    """Which leaf axes stand on which side of a product.

    Fields:
      stack: axes over which the leaf is a stack of independent layers.
      inputs: axes that meet the layer's input.
      outputs: axes of the layer's output.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class SideAtoms(NamedTuple):
    """The same before it is sorted: the atoms on each side, in the order of the product."""

    stack: Sequence[Atom]
    inputs: Sequence[Atom]
    outputs: Sequence[Atom]


def split_sides(rank: int, scanned: tuple[int, ...], atoms: SideAtoms) -> Sides:
    """Sort a leaf's axes by the side of the product they stand on.

    Axes of size 1 that a reshape dropped join the input's side, or an output's side left empty.

    Args:
      rank: the number of the leaf's axes.
      scanned: axes that an enclosing scan slices; they become stacked.
      atoms: what stands on each side.

    Raises:
      NotALayer: the leaf cannot be seen as a matrix here.
    """
    stack, inputs, outputs = (axes_of(group) for group in atoms)
    flat = [*stack, *inputs, *outputs]
    if any(axis < 0 for axis in flat):
        raise NotALayer("broadcast before its product")
    if len(flat) != len(set(flat)):
        # Half of an axis on each side is no partition of axes: no matrix view has it.
        raise NotALayer("an axis is split between the input and the output of its product")
    # An axis of size 1 holds no choice: either side gives the same matrix.
    dropped = [axis for axis in range(rank) if axis not in flat and axis not in scanned]
    if dropped and not outputs:
        outputs = (dropped.pop(),)
    inputs = tuple(sorted((*inputs, *dropped)))
    if not inputs or not outputs:
        raise NotALayer("a vector or scalar, not a matrix")
    return Sides((*scanned, *stack), inputs, outputs)


def leaf_order(atoms: Sequence[Atom]) -> list[int]:
    """Return the permutation that puts ``atoms`` into the leaf's own (row-major) order."""
    return sorted(range(len(atoms)), key=lambda i: (atoms[i].axis, -atoms[i].stride))


def axes_of(atoms: Sequence[Atom]) -> tuple[int, ...]:
    """Return the leaf axes that ``atoms`` touch, ascending."""
    return tuple(sorted({atom.axis for atom in atoms}))


def features(array: jax.Array, lead: int, dims: Sequence[tuple[Atom, ...]]) -> jax.Array:
    """Flatten the dimensions after the first ``lead`` into features in the leaf's order."""
    # A product may contract axes in any order, while a Gram matrix is read in the leaf's.
    atoms = [atom for dim in dims for atom in dim]
    order = leaf_order(atoms)
    array = array.reshape(*array.shape[:lead], *(atom.size for atom in atoms))
    array = jnp.transpose(array, (*range(lead), *(lead + i for i in order)))
    return array.reshape(*array.shape[:lead], math.prod(array.shape[lead:]))
