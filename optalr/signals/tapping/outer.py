"""Gradients as sums of outer products, for methods that multiply them by matrices.

The gradient of a dense layer is G = Σ α βᵀ over the examples and positions of a batch. Where these
are few, ``A G B = Σ (Aα)(Bβ)ᵀ`` takes fewer flops from both sides than from G. The backward pass
hands both sides on (``taps``). Here is decided for which layers, and they are laid out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.linalg.structured import Full
from optalr.signals.moments import OuterProducts, outer_products_pay
from optalr.signals.tapping.capture import Tapped
from optalr.signals.tapping.gauge import Dummies, side_sizes
from optalr.signals.tracing.reach.readers import is_sole_reader
from optalr.signals.tracing.site import Operands, Sampling, Site


def with_outer_products(tapped: Tapped) -> Tapped:
    """Return a tapped loss that hands on both sides of gradients wherever that can pay."""
    late, traced = tapped.measured_late(), tapped.traced
    # What reads a leaf beside its layer (a penalty, say) adds to its gradient.
    chosen = {
        site.leaf
        for site in tapped.layers.sites
        if site.leaf in late
        and _pays(site, traced.leaves[site.leaf].dtype)
        and is_sole_reader(traced.closed, site)
    }
    return dataclasses.replace(tapped, outer_products=frozenset(chosen))


def outer_entry(
    tapped: Tapped, slots: dict[int, Dummies], gradients: Sequence[jax.Array]
) -> dict[str, Any]:
    """Return the entry of ``extras`` with ``OuterProducts`` where they pay, if they do anywhere.

    Args:
      tapped: the loss that was differentiated.
      slots: what each slot gathered.
      gradients: of all leaves.
    """
    if not tapped.outer_products:
        return {}
    found: list[OuterProducts | None] = [None] * tapped.traced.num_leaves
    for site in tapped.layers.sites:
        operands = slots.get(site.leaf)
        if site.leaf in tapped.outer_products and isinstance(operands, Operands):
            found[site.leaf] = _laid_out(site, operands, gradients[site.leaf])
    return {"outer_products": jax.tree.unflatten(tapped.traced.treedef, found)}


def _pays(site: Site, dtype: Any) -> bool:
    """Return whether the sides of a gradient of this dtype are cheaper to multiply than it is."""
    if not site.sums_outer_products or site.view.cut is not None:
        return False
    # A gradient of another precision has been rounded where its sides have not.
    if any(operand.dtype != dtype for operand in site.operand_types()):
        return False
    m, n = side_sizes(site)
    return outer_products_pay(math.prod(site.extent()), (Full(m), Full(n)))


def _laid_out(site: Site, operands: Operands, gradient: jax.Array) -> OuterProducts:
    every = site.signals(operands, (Sampling(), jnp.zeros((), jnp.uint32)))
    stack, *_ = site.leaf_view.matrix_shape(gradient.shape)
    inputs, cotangents = (
        side.reshape(*stack, *side.shape[1:]) for side in (every.inputs, every.outputs)
    )
    if site.leaf_view.input_side == "rows":
        return OuterProducts(inputs, cotangents, gradient, site.leaf_view)
    return OuterProducts(cotangents, inputs, gradient, site.leaf_view)
