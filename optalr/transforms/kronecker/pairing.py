"""Pairing what a batch captured with the leaves: moments by key path, biases with their kernels."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from optalr.arguments import SUPPLY
from optalr.linalg.structured import Structured
from optalr.signals.moments import LayerMoments, OuterProducts, is_moments, is_outer_products
from optalr.signals.ray import by_path
from optalr.transforms.kronecker.leaves import Bias, Kernel, Leaf

# What to do where the signals are missing.
REMEDY = f"{SUPPLY.format(loss='loss_fn')} Or choose statistics='gradient', which needs none."


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


def own_products(
    updates: Any, extras: Mapping[str, Any], own: set[int], *, share: jax.Array
) -> dict[int, OuterProducts]:
    """Return what arrived of gradients as sums of outer products, by the leaves' positions.

    Args:
      updates: what arrived.
      extras: of the update; products are those of its ``grad``.
      own: the leaves that are the loss's gradient times one factor.
      share: that factor.
    """
    nodes = jax.tree_util.tree_leaves_with_path(
        extras.get("outer_products"), is_leaf=is_outer_products
    )
    known = {} if extras.get("grad") is None else by_path(extras["grad"])
    # A gradient that was accumulated over batches is not the sum over the last of them.
    products = {
        path: node
        for path, node in ((jax.tree_util.keystr(keys), node) for keys, node in nodes)
        if path in known and node.gradient is known[path]
    }

    def arrived(node: OuterProducts) -> OuterProducts:
        return dataclasses.replace(node, right=node.right * share.astype(node.right.dtype))

    return {
        i: arrived(products[path])
        for i, path in enumerate(by_path(updates))
        if i in own and path in products
    }


def sides_of(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Map the key path of each kernel that has moments to the forms of its rows and columns."""
    kernels = [leaf for leaf in leaves if isinstance(leaf, Kernel) and leaf.moments is not None]
    return {leaf.path: leaf.sides for leaf in kernels}


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
    for side, measured in zip(plan.sides, (moments.rows, moments.cols), strict=True):
        of_that_size = isinstance(measured, Structured) and measured.size == side.size
        if of_that_size and not measured.is_like(side):
            raise ValueError(
                f"The signals of leaf {plan.path} hold a {measured.label}, but its state a "
                f"{side.label}. Pass the method's options to value_grad_and_extras(..., storage=)."
            )
    stack, m, n = plan.view.matrix_shape(plan.shape)
    wanted = ((*stack, m, m), (*stack, n, n))
    got = tuple(map(_shape_seen, (moments.rows, moments.cols), plan.sides, wanted))
    if wanted != got:
        raise ValueError(
            f"The signals of leaf {plan.path} (shape {plan.shape}) have Gram matrices of shapes "
            f"{got[0]} and {got[1]}, but its state was made for {wanted[0]} and {wanted[1]}. "
            "Pass layout=optalr.coverage(loss_fn, params, *args), which says how each leaf is seen "
            "as a matrix."
        )


def _shape_seen(measured: Any, side: Structured, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the Gram matrices of which a side was measured."""
    if not isinstance(measured, Structured):
        return tuple(measured.shape)
    # What was measured in the form of the state fits it.
    fits = measured.size == side.size
    return expected if fits else (*measured.stack, measured.size, measured.size)
