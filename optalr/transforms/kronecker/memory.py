"""What is remembered of each leaf.

In a state each part of a memory, such as ``memory.rows.factor``, is a tree of the parameters'
structure with one array per leaf. So factors and roots are stored leaf by leaf, and not in stacks
of equal size. Nine steps in ten or more are plain: they only multiply by the roots, where these
lie. A refresh wants stacks, and copies the factors into some (``refresh.py``, the only module that
knows of stacks). A checkpoint then names each factor by its leaf, and a state shows by itself what
it holds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.linalg.structured import Structured
from optalr.transforms.kronecker.leaves import Kernel

# Stands in place of what is not kept. It is a pytree node without leaves, so it takes no memory.
NOTHING = optax.MaskedNode()


class SideMemory(NamedTuple):
    """What is kept of one side of a kernel. Every shape begins with the kernel's stack axes.

    A side of n rows that is kept in blocks, or as a diagonal, has that shape in place of (n, n).
    """

    factor: Any = NOTHING  # (n, n), the moving average of Gram matrices, which starts from zero
    root: Any = NOTHING  # (n, n), the factor's root, or its eigenbasis
    eigenvalues: Any = NOTHING  # (n,), where eigenbases are kept
    basis: Any = NOTHING  # (n, n), where roots are taken from a basis that is refreshed


class LeafMemory(NamedTuple):
    """What is kept of a leaf: of a kernel two sides, of an elementwise leaf a second moment."""

    rows: SideMemory = SideMemory()
    cols: SideMemory = SideMemory()
    # An elementwise leaf: its shape. A kernel of matrix shape (m, n) with spectrum="measured":
    # (m, n), the squared gradient in the eigenbases, relative to the product of the largest row and
    # column eigenvalue.
    second_moment: Any = NOTHING

    @property
    def sides(self) -> tuple[SideMemory, SideMemory]:
        """Rows and columns."""
        return self.rows, self.cols


_PARTS = jax.tree.structure(LeafMemory(), is_leaf=lambda node: node is NOTHING)


def to_trees(memories: Sequence[LeafMemory], structure: Any) -> LeafMemory:
    """Return one memory whose parts are trees of a structure, from those of its leaves."""
    parts = [_PARTS.flatten_up_to(memory) for memory in memories]
    columns = zip(*parts, strict=True) if parts else [[]] * _PARTS.num_leaves
    return _PARTS.unflatten([structure.unflatten(column) for column in columns])


def from_trees(trees: LeafMemory, structure: Any) -> list[LeafMemory]:
    """Undo ``to_trees``."""
    columns = [structure.flatten_up_to(tree) for tree in _PARTS.flatten_up_to(trees)]
    return [_PARTS.unflatten(parts) for parts in zip(*columns, strict=True)]


def factors_of(
    leaf: Kernel, memory: LeafMemory, weight: jax.Array
) -> tuple[Structured, Structured]:
    """Return both factors, corrected for the moving average's start at zero."""
    scale = 1 / jnp.where(weight > 0, weight, 1)
    rows, cols = leaf.rows.holding(memory.rows.factor), leaf.cols.holding(memory.cols.factor)
    return rows.scaled(scale), cols.scaled(scale)


def roots_of(leaf: Kernel, memory: LeafMemory) -> tuple[Structured, Structured]:
    """Return both roots, or both eigenbases."""
    return leaf.rows.holding(memory.rows.root), leaf.cols.holding(memory.cols.root)
