"""The vocabulary of captured signals: moments of a layer, how its leaf is seen and stored.

Notation. A layer computes ``s_i = Wᵀ α_i`` for example ``i`` (of N) and position ``t`` (of T);
``β_i = ∂ℓ_i/∂s_i`` is the back-propagated signal of the *per-example* loss ``ℓ_i``.

    A = (1/NT) Σ_i Σ_t α α ᵀ        B = (1/N) Σ_i Σ_t β βᵀ        F ≈ B ⊗ A

(Martens & Grosse 2015; Grosse & Martens 2016 for convolutions, with the scale shared so that A
does not grow with T.)

The capture fills these classes, and transformations read them; nothing here computes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.blocks import Blocks
from optalr.linalg.structured import Diagonal, Full, Structured


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """Second moments of what went into and came back to one layer, oriented to its leaf.

    Attributes:
      rows: ``(*stack, m, m)`` float32, the Gram matrix of the rows' side of the leaf's matrix view
        ``(m, n)``: A for a kernel applied as ``x @ W``, B for one applied as ``W @ x``. Where only
        blocks or a diagonal were asked for, these, as a form that holds its array.
      cols: ``(*stack, n, n)`` float32, the Gram matrix of the columns' side, or what was asked for.
      row_mean: ``(*stack, m)`` float32, the mean input, if the rows are the input's side.
      col_mean: ``(*stack, n)`` float32, the mean input, if the columns are the input's side.
      count: float32 scalar, N, the examples measured; 0 where capture was off, and then
        everything else is 0 as well.
      positions: float32 scalar, T, the positions an example has (spatial, time, repeated use).
      bias: the key path (``jax.tree_util.keystr``) of the bias added to this layer's output, or
        None. Static.
      samples: float32 scalar, how many of the NT positions were looked at; None stands for all.
    """

    rows: Any
    cols: Any
    row_mean: jax.Array | None
    col_mean: jax.Array | None
    count: jax.Array
    positions: jax.Array
    # Static, so that it survives jit, scan and vmap, which carry arrays only.
    bias: str | None = dataclasses.field(default=None, metadata={"static": True})
    samples: jax.Array | None = None

    @property
    def num_samples(self) -> jax.Array:
        """``samples``, or all NT where it is None."""
        return self.count * self.positions if self.samples is None else self.samples

    @property
    def input_side(self) -> str:
        """``"rows"`` or ``"cols"``: which side of the leaf the layer's input meets."""
        return "rows" if self.row_mean is not None else "cols"


@dataclasses.dataclass(frozen=True)
class LeafView:
    """How one leaf is seen as a (stack of) matrices: a partition of its axes.

    Attributes:
      stack: axes over which the leaf is a stack of independent layers (a scanned stack of layers).
      rows: axes that, flattened in order, index the rows.
      cols: axes that, flattened in order, index the columns.
      input_side: ``"rows"`` where the layer's input meets the rows, else ``"cols"``.
      bias: key path of the bias that is added to this layer's output, or None.
    """

    stack: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]
    input_side: str = "rows"
    bias: str | None = None

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Return ``(stack sizes, m, n)`` of a leaf of this ``shape``."""
        return (
            tuple(shape[axis] for axis in self.stack),
            math.prod(shape[axis] for axis in self.rows),
            math.prod(shape[axis] for axis in self.cols),
        )

    def is_like(self, other: "LeafView") -> bool:
        """Return whether two views make the same matrix of a leaf."""
        return (self.stack, self.rows, self.cols) == (other.stack, other.rows, other.cols)

    def to_matrix(self, leaf: jax.Array) -> jax.Array:
        """Return the ``(*stack, m, n)`` matrix view of ``leaf``."""
        stack, m, n = self.matrix_shape(leaf.shape)
        return jnp.transpose(leaf, (*self.stack, *self.rows, *self.cols)).reshape(*stack, m, n)

    def from_matrix(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undo ``to_matrix`` for a leaf of ``shape``."""
        order = (*self.stack, *self.rows, *self.cols)
        # Sorting positions by the axis that stands there inverts a permutation.
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return jnp.transpose(matrix.reshape([shape[axis] for axis in order]), inverse)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OuterProducts:
    """The gradient of one layer as a sum of outer products, G = Σ_r left_r right_rᵀ.

    There is one for each position of each example. Where these are few, ``A G B`` takes fewer flops
    from the two sides than from G.

    Attributes:
      left: ``(*stack, r, m)``, what meets the rows of the leaf's matrix view ``(m, n)``.
      right: ``(*stack, r, n)``, what meets its columns.
      gradient: the leaf's gradient, as the loss gave it.
      view: that matrix view. Static.
    """

    left: jax.Array
    right: jax.Array
    gradient: jax.Array
    view: LeafView = dataclasses.field(metadata={"static": True})


def default_view(shape: tuple[int, ...]) -> LeafView | None:
    """Return the view assumed without a layout: all axes but the last by the last.

    Leaves with fewer than two axes have no view (None): they are biases or diagonal.
    """
    # Flax, Haiku and most hand-written JAX keep a kernel's output features last, after all axes
    # that the input meets (a convolution's window and channels).
    if len(shape) < 2:
        return None
    return LeafView((), tuple(range(len(shape) - 1)), (len(shape) - 1,))


AUTO = "auto"
# Roots cost the cube of a side. At 1152 rows (a 3×3 convolution's of 128 channels; two such blocks
# for one of 256) and 50 updates between roots they take 3 % of the gradient's flops in a VGG of 9
# million parameters and batches of 128, for 9 % with whole sides of 2304 rows.
AUTO_BLOCK = 1152

# What a side stores, and what both sides of a leaf do, rows first.
Form = Full | Blocks | Diagonal
Sides = tuple[Form, Form]


@dataclasses.dataclass(frozen=True)
class FactorStorage:
    """The options of a Kronecker-factored method that decide what it keeps of a leaf.

    The coverage report and the transformation both read it: what is printed is what is kept.

    Attributes:
      spectrum: ``"factored"`` keeps roots; ``"exact"`` eigenbases and eigenvalues; ``"measured"``
        a second moment of the leaf's size beside these.
      block_size: sides longer than this get block-diagonal factors of at most this size; None for
        no blocks. ``"auto"`` is 1152, of sides that are not longer than ``max_factor_size``.
      max_factor_size: sides longer than this, and not blocked, keep only their factor's diagonal.
      joint_bias: treat a bias as one more row of its kernel.
      root_method: with ``"eigenbasis"`` a factored spectrum keeps the bases beside the roots.
      root_dtype: what roots and bases that are matrices rest in, ``"float32"`` or ``"bfloat16"``;
        None for the dtype that they are computed in, float32 or wider.
    """

    spectrum: str = "factored"
    block_size: int | str | None = AUTO
    max_factor_size: int = 4096
    joint_bias: bool = False
    root_method: str = "auto"
    root_dtype: Any = None

    @property
    def largest_block(self) -> int | None:
        """``block_size``, with a number for ``"auto"``."""
        return AUTO_BLOCK if isinstance(self.block_size, str) else self.block_size

    def side(self, size: int) -> Form:
        """Return how the factor of a side of this size is stored."""
        block, too_long = self.largest_block, size > self.max_factor_size
        # A number that the user gave holds for sides of any length.
        if block is not None and size > block and not (too_long and self.block_size == AUTO):
            return Blocks(size, num_blocks=math.ceil(size / block))
        return Diagonal(size) if too_long else Full(size)

    def sides(self, view: LeafView, shape: tuple[int, ...]) -> Sides:
        """Return how both factors of a leaf are stored; a joint bias is one more row of one."""
        _, m, n = view.matrix_shape(shape)
        if self.joint_bias and view.bias is not None:
            m, n = (m + 1, n) if view.input_side == "rows" else (m, n + 1)
        return self.side(m), self.side(n)


# Products with the sides must take less than this share of those with the gradient itself. They are
# of other shapes, and a few more operations to compile.
_PAYS = 0.7


def outer_products_pay(num_rows: int, sides: tuple[Structured, Structured]) -> bool:
    """Return whether both sides of a gradient are cheaper to multiply than the gradient.

    Args:
      num_rows: how many outer products it is the sum of.
      sides: the forms of the two matrices that it is multiplied by.
    """
    m, n = (side.size for side in sides)
    block_m, block_n = (max(side.block, 1) for side in sides)
    apart = num_rows * (m * block_m + n * block_n + m * n)
    return apart < _PAYS * m * n * (block_m + block_n)


def is_outer_products(node: Any) -> bool:
    """Return whether a node of a pytree is an ``OuterProducts``, for ``is_leaf=``."""
    return isinstance(node, OuterProducts)


def is_moments(node: Any) -> bool:
    """Return whether a node of a pytree is a ``LayerMoments``, for ``is_leaf=``."""
    return isinstance(node, LayerMoments)
