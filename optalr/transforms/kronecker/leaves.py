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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.structured import Structured
from optalr.signals.coverage import Coverage
from optalr.signals.moments import FactorStorage, LayerMoments, LeafView, default_view, is_moments
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


def with_signals(plans: Sequence[Leaf], signals: Any) -> list[Leaf]:
    """Return the leaves with what ``signals`` say about each, paired by key path.

    Kernels get their moments. A leaf that the signals name as the bias of a kernel becomes its
    ``Bias``, even if it has a memory of its own. ``signals=None`` leaves every leaf as it is.

    Raises:
      ValueError: moments do not fit their leaf, or any leaf, or moments that a layout promised are
        missing.
    """
    if signals is None:
        return list(plans)
    pairs = jax.tree_util.tree_leaves_with_path(
        signals, is_leaf=lambda node: node is None or is_moments(node)
    )
    places = {jax.tree_util.keystr(path): node for path, node in pairs}
    moments = {path: node for path, node in places.items() if is_moments(node)}
    leaves = [_with_moments(plan, moments) for plan in plans]
    if moments and plans and not any(plan.path in places for plan in plans):
        raise ValueError(
            f"signals has moments for {', '.join(list(moments)[:3])}, but updates has no leaf that "
            f"signals knows (the first is {plans[0].path or 'updates itself'}). Put "
            "scale_by_kronecker outside of wrappers that flatten or rename the leaves, such as "
            "optax.flatten."
        )
    index = {leaf.path: i for i, leaf in enumerate(leaves)}
    for path, node in moments.items():
        if path not in index or node.bias not in index:
            continue
        kernel, bias = leaves[index[path]], leaves[index[node.bias]]
        if _is_bias_of(bias, kernel) and isinstance(kernel, Kernel):
            leaves[index[node.bias]] = Bias(bias.path, bias.shape, index[path], kernel)
    return leaves


def _with_moments(plan: Leaf, moments: Mapping[str, LayerMoments]) -> Leaf:
    if not isinstance(plan, Kernel):
        return plan
    if plan.path in moments:
        _check_fit(plan, moments[plan.path])
        return dataclasses.replace(plan, moments=moments[plan.path])
    if plan.captured:
        raise ValueError(_missing(plan, moments))
    return plan


def _is_bias_of(bias: Leaf, kernel: Leaf) -> bool:
    """Return whether a leaf can take the output side's factor of a kernel."""
    if isinstance(bias, Bias) or not isinstance(kernel, Kernel) or kernel.joint_bias is not None:
        return False
    # A bias of another size, such as one that broadcasts, cannot be multiplied by the factor.
    outputs = kernel.sides[kernel.output_side].size
    return math.prod(bias.shape) == math.prod(kernel.stack) * outputs


def _missing(plan: Kernel, moments: Mapping[str, LayerMoments]) -> str:
    """Return the message about signals that a layout promised and that are missing."""
    others = ", ".join([*list(moments)[:3], *(["..."] if len(moments) > 3 else [])])
    return (
        f"layout says that leaf {plan.path} is captured, but signals has no moments for it "
        f"(only for: {others or 'none'}). Pass the whole signals of evaluate = "
        "optalr.value_grad_and_extras(loss_fn), with the same loss_fn and parameters as those of "
        "layout=optalr.coverage(loss_fn, params, *args)."
    )


def _check_fit(plan: Kernel, moments: LayerMoments) -> None:
    """Raise unless the moments' Gram matrices are those of the leaf's matrix view."""
    stack, m, n = plan.view.matrix_shape(plan.shape)
    wanted = ((*stack, m, m), (*stack, n, n))
    got = (tuple(moments.rows.shape), tuple(moments.cols.shape))
    if wanted != got:
        raise ValueError(
            f"The signals of leaf {plan.path} (shape {plan.shape}) have Gram matrices of shapes "
            f"{got[0]} and {got[1]}, but its state was made for {wanted[0]} and {wanted[1]}. "
            "Pass layout=optalr.coverage(loss_fn, params, *args), which says how each leaf is seen "
            "as a matrix."
        )
