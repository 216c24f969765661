"""What is remembered of each leaf.

Factors and roots rest a leaf, not in stacks of equal size. A plain step, nine in ten or more of
all, multiplies by them where they lie; a refresh, which wants stacks, copies them into some once
(``refresh.py``, the only module that knows of stacks). A checkpoint names each factor by its leaf,
and a state tells by itself what it holds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optalr.linalg.structured import Structured
from optalr.transforms.kronecker.leaves import Kernel

# What stands in the place of something that is not kept: a pytree node without leaves.
NOTHING = optax.MaskedNode()


class SideMemory(NamedTuple):
    """What is kept of one side of a kernel: all shapes begin with its stack axes.

    A side of n rows that is kept in blocks, or as a diagonal, has that shape in place of (n, n).
    """

    factor: jax.Array  # (n, n), the moving average of Gram matrices, which starts from zero
    root: Any  # (n, n), the factor's root, or its eigenbasis
    eigenvalues: Any  # (n,), where eigenbases are kept
    basis: Any  # (n, n), where roots are taken from a basis that is refreshed


class KernelMemory(NamedTuple):
    """What is kept of a kernel of matrix shape (m, n)."""

    rows: SideMemory
    cols: SideMemory
    # (m, n), spectrum="measured": the squared gradient in the eigenbases, relative to the product
    # of the largest row and column eigenvalue
    second_moment: Any

    @property
    def sides(self) -> tuple[SideMemory, SideMemory]:
        """Rows and columns."""
        return self.rows, self.cols


# A kernel's memory, the second moments of an elementwise leaf (its shape), or NOTHING.
LeafMemory = KernelMemory | jax.Array | optax.MaskedNode


def factors_of(
    leaf: Kernel, memory: KernelMemory, weight: jax.Array
) -> tuple[Structured, Structured]:
    """Return both factors, freed of the moving average's start at zero."""
    scale = 1 / jnp.where(weight > 0, weight, 1)
    rows, cols = leaf.rows.holding(memory.rows.factor), leaf.cols.holding(memory.cols.factor)
    return rows.scaled(scale), cols.scaled(scale)


def roots_of(leaf: Kernel, memory: KernelMemory) -> tuple[Structured, Structured]:
    """Return both roots, or both eigenbases."""
    return leaf.rows.holding(memory.rows.root), leaf.cols.holding(memory.cols.root)
