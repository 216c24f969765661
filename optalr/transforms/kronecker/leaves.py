"""What the Kronecker form does with each leaf: decided from shapes, the layout and the signals.

Everything here is static: it is worked out at trace time and holds no arrays.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from optalr.signals.moments import Coverage, LayerMoments, LeafView, default_view, is_moments
from optalr.signals.storage import FactorStorage, Side

# Said wherever captured signals do not fit the state.
LAYOUT_REMEDY = (
    "Pass layout=optalr.coverage(loss_fn, params, *args), which tells how each leaf is a matrix."
)


_NO_SIDE = Side(0)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What is kept for one leaf.

    Attributes:
      path: key path of the leaf.
      shape: its shape.
      treatment: ``"kronecker"`` (two factors), ``"bias"`` (the output-side factor of its kernel),
        ``"joint"`` (a row of its kernel's matrix) or ``"diagonal"``.
      view: how the leaf is a matrix, for ``"kronecker"``.
      rows: the rows' side, for ``"kronecker"``.
      cols: the columns' side, for ``"kronecker"``.
      partner: index of the kernel of a ``"bias"`` or ``"joint"`` leaf, or of the joint bias of a
        ``"kronecker"`` leaf.
      captured: whether a layout says that signals of the leaf are captured.
      layer: index of the kernel of a bias that keeps a diagonal of its own beside it.
    """

    path: str
    shape: tuple[int, ...]
    treatment: str
    view: LeafView | None = None
    rows: Side = _NO_SIDE
    cols: Side = _NO_SIDE
    partner: int | None = None
    captured: bool = False
    layer: int | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.view.matrix_shape(self.shape)[0] if self.view else ()

    @property
    def sides(self) -> tuple[Side, Side]:
        """Rows and columns."""
        return self.rows, self.cols

    @property
    def output_side(self) -> int:
        """Index in ``sides`` of the side that meets the layer's output."""
        assert self.view is not None
        return 1 if self.view.input_side == "rows" else 0

    @property
    def num_outputs(self) -> int:
        """Units the leaf feeds: squared Frobenius norm of an ordinary initialisation."""
        view = self.view or default_view(self.shape)
        if view is None:
            return max(1, math.prod(self.shape))
        return max(1, *view.matrix_shape(self.shape)[1:])


def plan_leaves(
    tree: Any,
    layout: Coverage | None,
    storage: FactorStorage,
    bias: str,
) -> list[LeafPlan]:
    """Return a plan for each leaf of ``tree``, in the order of its leaves.

    ``bias`` says what a layout's biases get: ``"shared"``, the output-side factor of their kernel,
    ``"joint"``, a row of their kernel's matrix, or ``"own"``, a diagonal of their own.
    """
    leaves = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves_with_path(tree)]
    index = {path: i for i, (path, _) in enumerate(leaves)}
    if layout is None:
        return [_plan_by_shape(path, shape, storage) for path, shape in leaves]
    plans = [_plan_by_layout(path, shape, layout, storage) for path, shape in leaves]
    for i, plan in enumerate(plans):
        partner = index.get(plan.view.bias) if plan.view and plan.view.bias else None
        if partner is None:
            continue
        if bias == "own":
            plans[partner] = dataclasses.replace(plans[partner], layer=i)
        elif bias == "joint":
            plans[i] = _with_joint_bias(plan, partner, storage)
            plans[partner] = dataclasses.replace(plans[partner], treatment="joint", partner=i)
        else:
            plans[partner] = dataclasses.replace(plans[partner], treatment="bias", partner=i)
    # A bias whose kernel another transformation has (masked, partition) stands alone.
    return [
        dataclasses.replace(plan, treatment="diagonal")
        if plan.treatment == "bias" and plan.partner is None
        else plan
        for plan in plans
    ]


def leaves_with_path(tree: Any) -> list[tuple[Any, Any]]:
    """Return ``(key path, leaf)`` pairs."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _plan_by_shape(path: str, shape: tuple[int, ...], storage: FactorStorage) -> LeafPlan:
    view = default_view(shape)
    if view is None or math.prod(shape) == 0:
        return LeafPlan(path, shape, "diagonal")
    _, m, n = view.matrix_shape(shape)
    return LeafPlan(path, shape, "kronecker", view, storage.side(m), storage.side(n))


def _plan_by_layout(
    path: str, shape: tuple[int, ...], layout: Coverage, storage: FactorStorage
) -> LeafPlan:
    try:
        leaf = layout[path]
    except KeyError:
        raise ValueError(
            f"layout has no leaf {path}: it describes other parameters. Make it from these with "
            "optalr.coverage(loss_fn, params, *args)."
        ) from None
    if tuple(leaf.shape) != tuple(shape):
        raise ValueError(
            f"layout describes {path} with shape {tuple(leaf.shape)}, but it has {tuple(shape)}. "
            "Make the layout from these parameters with optalr.coverage(loss_fn, params, *args)."
        )
    if leaf.treatment != "kronecker" or leaf.view is None:
        return LeafPlan(path, shape, "bias" if leaf.treatment == "bias" else "diagonal")
    _, m, n = leaf.view.matrix_shape(shape)
    sides = storage.side(m), storage.side(n)
    return LeafPlan(path, shape, "kronecker", leaf.view, *sides, captured=True)


def _with_joint_bias(plan: LeafPlan, bias: int, storage: FactorStorage) -> LeafPlan:
    rows, cols = plan.rows.size, plan.cols.size
    if plan.output_side == 1:
        rows += 1
    else:
        cols += 1
    return dataclasses.replace(plan, rows=storage.side(rows), cols=storage.side(cols), partner=bias)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the statistics of one leaf come from in this trace.

    Attributes:
      kind: ``"signals"``, ``"gradient"``, ``"bias"``, ``"joint"`` or ``"diagonal"``.
      moments: the captured moments, for ``"signals"``.
      kernel: index of the kernel, where the leaf is the bias of one.
      output_side: which side of the kernel is its output's.
    """

    kind: str
    moments: LayerMoments | None = None
    kernel: int | None = None
    output_side: int = 1


def find_sources(plans: Sequence[LeafPlan], signals: Any) -> list[Source]:
    """Pair each leaf with its signals by key path; ``signals=None`` means gradients only."""
    pairs = jax.tree_util.tree_flatten_with_path(signals, is_leaf=is_moments)[0]
    moments = {jax.tree_util.keystr(path): node for path, node in pairs if is_moments(node)}
    index = {plan.path: i for i, plan in enumerate(plans)}
    kernel_of = {
        node.bias: index[path] for path, node in moments.items() if node.bias and path in index
    }
    sources = []
    for plan in plans:
        if plan.treatment in ("bias", "joint"):
            assert plan.partner is not None
            side = plans[plan.partner].output_side
            sources.append(Source(plan.treatment, kernel=plan.partner, output_side=side))
        elif plan.path in kernel_of and _is_bias_of(plan, plans, kernel_of, moments):
            kernel = kernel_of[plan.path]
            side = 1 if moments[plans[kernel].path].row_mean is not None else 0
            sources.append(Source("bias", kernel=kernel, output_side=side))
        elif plan.treatment == "diagonal":
            side = 1 if plan.layer is None else plans[plan.layer].output_side
            sources.append(Source("diagonal", kernel=plan.layer, output_side=side))
        elif plan.path in moments:
            check_fit(plan, moments[plan.path])
            side = 1 if moments[plan.path].row_mean is not None else 0
            sources.append(Source("signals", moments[plan.path], output_side=side))
        elif plan.captured and signals is not None:
            raise ValueError(_missing(plan, moments))
        else:
            sources.append(Source("gradient", output_side=plan.output_side))
    return sources


def _missing(plan: LeafPlan, moments: dict[str, LayerMoments]) -> str:
    """Say that the layout promises signals which did not come."""
    others = ", ".join([*list(moments)[:3], *(["..."] if len(moments) > 3 else [])])
    return (
        f"layout says that leaf {plan.path} is captured, but signals has no moments for it "
        f"(only for: {others or 'none'}). Pass the whole signals of evaluate = "
        "optalr.value_grad_and_extras(loss_fn), with the same loss_fn and parameters as those of "
        "layout=optalr.coverage(loss_fn, params, *args)."
    )


def _is_bias_of(
    plan: LeafPlan,
    plans: Sequence[LeafPlan],
    kernel_of: dict[str, int],
    moments: dict[str, LayerMoments],
) -> bool:
    kernel = plans[kernel_of[plan.path]]
    if kernel.treatment != "kronecker" or kernel.partner is not None:
        return False
    side = kernel.sides[1 if moments[kernel.path].row_mean is not None else 0]
    return math.prod(plan.shape) == math.prod(kernel.stack) * side.size


def check_fit(plan: LeafPlan, moments: LayerMoments) -> None:
    """Raise unless the moments' Gram matrices are those of the leaf's matrix view."""
    assert plan.view is not None
    stack, m, n = plan.view.matrix_shape(plan.shape)
    wanted = ((*stack, m, m), (*stack, n, n))
    got = (tuple(moments.rows.shape), tuple(moments.cols.shape))
    if wanted != got:
        raise ValueError(
            f"The signals of leaf {plan.path} (shape {plan.shape}) have Gram matrices of shapes "
            f"{got[0]} and {got[1]}, but its state was made for {wanted[0]} and {wanted[1]}. "
            f"{LAYOUT_REMEDY}"
        )
