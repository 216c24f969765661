"""What the Kronecker form does with each leaf. Shapes, the layout and the signals decide it.

Everything here is static: it is worked out while tracing. The only arrays in it are the moments
that a batch captured. A leaf is one of four things:

* a ``Kernel`` keeps two factors, one per side of its matrix view;
* a ``Bias`` keeps nothing: it takes the factor of its kernel's output side;
* a ``JointBias`` keeps nothing: it is one more row (or column) of its kernel's matrix;
* an ``Elementwise`` leaf keeps one second moment per number.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.structured import Structured
from optalr.signals.coverage import Coverage
from optalr.signals.moments import FactorStorage, LayerMoments, LeafView, default_view
from optalr.states import unboxed


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What all kinds of leaf have in common.

    Attributes:
      path: key path, ``jax.tree_util.keystr``.
      shape: the leaf's shape.
    """

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Elementwise(Leaf):
    """A leaf with one second moment per number.

    Attributes:
      layer: the kernel whose outputs the leaf is added to, where the layout says so.
    """

    layer: "Kernel | None" = None


@dataclasses.dataclass(frozen=True)
class Kernel(Leaf):
    """A leaf with two factors.

    Attributes:
      view: how the leaf is a (stack of) matrices.
      rows: what is kept of the rows' factor.
      cols: what is kept of the columns' factor.
      joint_bias: index of the leaf that is one more row of the matrix, on the input's side.
      captured: whether a layout says that signals of the leaf are captured.
      moments: what this batch captured of the layer; None where its gradient must do.
    """

    view: LeafView
    rows: Structured
    cols: Structured
    joint_bias: int | None = None
    captured: bool = False
    moments: LayerMoments | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.view.matrix_shape(self.shape)[0]

    @property
    def sides(self) -> tuple[Structured, Structured]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def output_side(self) -> int:
        """Index in ``sides`` of the side that meets the layer's output."""
        side = self.view.input_side if self.moments is None else self.moments.input_side
        return 1 if side == "rows" else 0

    def to_matrix(self, grads: Sequence[jax.Array], index: int) -> jax.Array:
        """Return the matrix view of this leaf, the ``index``-th, its joint bias included."""
        matrix = self.view.to_matrix(grads[index])
        if self.joint_bias is None:
            return matrix
        axis = -2 if self.output_side == 1 else -1
        bias = grads[self.joint_bias].reshape(*self.stack, -1).astype(matrix.dtype)
        return jnp.concatenate([matrix, jnp.expand_dims(bias, axis)], axis)

    def from_matrix(self, matrix: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Undo ``to_matrix`` and ``pad``: return the leaf, and the flat joint bias."""
        matrix = matrix[..., : self.rows.size, : self.cols.size]
        bias = None
        if self.joint_bias is not None and self.output_side == 1:
            matrix, bias = matrix[..., :-1, :], matrix[..., -1, :]
        elif self.joint_bias is not None:
            matrix, bias = matrix[..., :-1], matrix[..., -1]
        return self.view.from_matrix(matrix, self.shape), bias

    def pad(self, matrix: jax.Array) -> jax.Array:
        """Pad a matrix view to whole blocks on both sides."""
        return self.cols.pad(self.rows.pad(matrix, -2), -1)


@dataclasses.dataclass(frozen=True)
class Bias(Leaf):
    """A leaf that is preconditioned by the output side of its kernel.

    Attributes:
      kernel: index of the kernel.
      layer: the kernel.
    """

    kernel: int
    layer: Kernel


@dataclasses.dataclass(frozen=True)
class JointBias(Bias):
    """A leaf that is a row of its kernel's matrix."""


def plan_leaves(
    tree: Any, layout: Coverage | None, storage: FactorStorage, *, own_biases: bool = False
) -> list[Leaf]:
    """Return what each leaf of ``tree`` is, in the order of its leaves.

    Args:
      tree: parameters or gradients.
      layout: what ``optalr.coverage`` returned, or None to judge by shapes.
      storage: how a side of a given size is kept, and whether biases are joint.
      own_biases: whether biases that the layout knows keep second moments of their own. They must
        where no signals are captured.
    """
    leaves = [(path, leaf.shape) for path, leaf in _named_leaves(tree, layout)]
    if layout is None:
        return [_plan_by_shape(path, shape, storage) for path, shape in leaves]
    plans = [_plan_by_layout(path, shape, layout, storage=storage) for path, shape in leaves]
    index = {path: i for i, (path, _) in enumerate(leaves)}
    for i, plan in enumerate(plans):
        # A bias whose kernel another transformation has (masked, partition) stands alone.
        if not isinstance(plan, Kernel) or plan.view.bias not in index:
            continue
        bias = index[plan.view.bias]
        if storage.joint_bias:
            plans[i] = plan = _with_joint_bias(plan, bias, storage)
            plans[bias] = JointBias(*leaves[bias], kernel=i, layer=plan)
        elif own_biases:
            plans[bias] = Elementwise(*leaves[bias], layer=plan)
        else:
            plans[bias] = Bias(*leaves[bias], kernel=i, layer=plan)
    return plans


def _named_leaves(tree: Any, layout: Coverage | None) -> list[tuple[str, Any]]:
    """Return ``(key path, leaf)`` pairs, without boxes in paths that the layout has without them.

    The optimizer of nnx gives boxed parameters to ``init``, and bare ones to ``update``.
    """
    known = {} if layout is None else layout.treatment
    boxed, bare = (jax.tree_util.tree_leaves_with_path(t) for t in (tree, unboxed(tree)))
    named = []
    for (path, leaf), (other, _) in zip(boxed, bare, strict=True):
        names = [jax.tree_util.keystr(path), jax.tree_util.keystr(other)]
        named.append((next((name for name in names if name in known), names[0]), leaf))
    return named


def _plan_by_shape(path: str, shape: tuple[int, ...], storage: FactorStorage) -> Leaf:
    view = default_view(shape)
    if view is None or math.prod(shape) == 0:
        return Elementwise(path, shape)
    _, m, n = view.matrix_shape(shape)
    return Kernel(path, shape, view, storage.side(m), storage.side(n))


def _plan_by_layout(
    path: str, shape: tuple[int, ...], layout: Coverage, *, storage: FactorStorage
) -> Leaf:
    try:
        known = layout[path]
    except KeyError:
        raise ValueError(
            f"layout has no leaf {path}: it describes other parameters. Make it from these with "
            "optalr.coverage(loss_fn, params, *args)."
        ) from None
    if tuple(known.shape) != tuple(shape):
        raise ValueError(
            f"layout describes {path} with shape {tuple(known.shape)}, but it has {tuple(shape)}. "
            "Make the layout from these parameters with optalr.coverage(loss_fn, params, *args)."
        )
    if known.treatment != "kronecker" or known.view is None:
        return Elementwise(path, shape)
    _, m, n = known.view.matrix_shape(shape)
    return Kernel(path, shape, known.view, storage.side(m), storage.side(n), captured=True)


def _with_joint_bias(plan: Kernel, bias: int, storage: FactorStorage) -> Kernel:
    rows, cols = plan.rows.size, plan.cols.size
    if plan.output_side == 1:
        rows += 1
    else:
        cols += 1
    return dataclasses.replace(
        plan, rows=storage.side(rows), cols=storage.side(cols), joint_bias=bias
    )
