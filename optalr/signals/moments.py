"""The vocabulary of captured signals: moments of one layer, and how a leaf is seen as a matrix.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMoments:
    """Second moments of what went into and came back to one layer, oriented to its leaf.

    Attributes:
      rows: ``(*stack, m, m)`` float32, the Gram matrix of the rows' side of the leaf's matrix view
        ``(m, n)``: A for a kernel applied as ``x @ W``, B for one applied as ``W @ x``.
      cols: ``(*stack, n, n)`` float32, the Gram matrix of the columns' side.
      row_mean: ``(*stack, m)`` float32, the mean input, if the rows are the input's side.
      col_mean: ``(*stack, n)`` float32, the mean input, if the columns are the input's side.
      count: float32 scalar, N, the examples measured; 0 where capture was off, and then
        everything else is 0 as well.
      positions: float32 scalar, T, the positions an example has (spatial, time, repeated use).
      bias: the key path (``jax.tree_util.keystr``) of the bias added to this layer's output, or
        None. Static.
    """

    rows: jax.Array
    cols: jax.Array
    row_mean: jax.Array | None
    col_mean: jax.Array | None
    count: jax.Array
    positions: jax.Array
    # Static, so that it survives jit, scan and vmap, which carry arrays only.
    bias: str | None = dataclasses.field(default=None, metadata={"static": True})

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


def default_view(shape: tuple[int, ...]) -> LeafView | None:
    """Return the view assumed without a layout: all axes but the last by the last.

    Leaves with fewer than two axes have no view (None): they are biases or diagonal.
    """
    # Flax, Haiku and most hand-written JAX keep a kernel's output features last, after all axes
    # that the input meets (a convolution's window and channels).
    if len(shape) < 2:
        return None
    return LeafView((), tuple(range(len(shape) - 1)), (len(shape) - 1,))


@dataclasses.dataclass(frozen=True)
class LeafTreatment:
    """What a Kronecker-factored method does with one leaf, and why.

    Attributes:
      path: key path, ``jax.tree_util.keystr``.
      shape: the leaf's shape.
      treatment: ``"kronecker"`` (captured layer), ``"bias"`` (the columns' factor of its layer) or
        ``"diagonal"`` (fallback).
      view: how the leaf is seen as a matrix, for ``"kronecker"``.
      state_bytes: bytes that ``scale_by_kronecker`` keeps for the leaf, given the report as its
        ``layout`` and the same options.
      reason: why no layer was found, or why a factor is not kept whole; empty otherwise.
    """

    path: str
    shape: tuple[int, ...]
    treatment: str
    view: LeafView | None
    state_bytes: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What ``optalr.coverage`` returns: a printable report, and the ``layout=`` of a method.

    Attributes:
      leaves: one ``LeafTreatment`` a leaf, in the order of ``jax.tree_util.tree_leaves``.
    """

    leaves: tuple[LeafTreatment, ...]

    @property
    def treatment(self) -> dict[str, str]:
        """Map each leaf's key path to its treatment."""
        return {leaf.path: leaf.treatment for leaf in self.leaves}

    def __getitem__(self, path: str) -> LeafTreatment:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(path)

    def __str__(self) -> str:
        header = ("leaf", "shape", "treatment", "state bytes", "reason")
        rows = [
            (leaf.path, str(leaf.shape), leaf.treatment, f"{leaf.state_bytes:,}", leaf.reason)
            for leaf in self.leaves
        ]
        total = sum(leaf.state_bytes for leaf in self.leaves)
        rows.append(("total", "", "", f"{total:,}", ""))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in [header, tuple("-" * w for w in widths), *rows]
        ]
        return "\n".join(lines)

    __repr__ = __str__


def is_moments(node: Any) -> bool:
    """Return whether a node of a pytree is a ``LayerMoments``, for ``is_leaf=``."""
    return isinstance(node, LayerMoments)
