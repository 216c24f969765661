"""Primitives that cut a parameter apart, join several into one array, or scale one.

In: what the equation's inputs look at. Out: what its outputs look at.
"""

import dataclasses
import math
from typing import Any, TypeGuard

from optalr.signals.tracing.site import Site
from optalr.signals.tracing.views import (
    Atom,
    Joined,
    NotALayer,
    Scale,
    Seen,
    Stretch,
    View,
    change_scales,
    parts_of,
)
from optalr.signals.tracing.walk import Scaling, Spot, Walk, give_up

# Primitives whose output has no entries but those of their first input.
_REPEATS = frozenset({"broadcast_in_dim", "reshape", "convert_element_type", "copy"})


def pass_concatenation(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Join parameters; a parameter beside anything else is lost."""
    # Data beside a parameter would make a product that is a layer in part of its columns only.
    parts = tuple(view for view in seen if _is_plain_parameter(view))
    if len(parts) != len(seen):
        return give_up(walk, spot, seen)
    return [Joined(parts, spot.params["dimension"])]


def pass_slice(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow part of a parameter's axis through a ``slice``."""
    params, view = spot.params, seen[0]
    strided = any(stride != 1 for stride in params["strides"] or ())
    if not _is_plain_parameter(view) or strided:
        return give_up(walk, spot, seen)
    ends = zip(params["start_indices"], params["limit_indices"], strict=True)
    parts = [Stretch(axis, start, limit - start) for axis, (start, limit) in enumerate(ends)]
    narrowed = [part for part in parts if part.size != view.shape[part.axis]]
    if not narrowed:
        return [view]
    # With several axes cut the part is none along one axis.
    cut = _cut_out(view, narrowed[0]) if len(narrowed) == 1 else None
    return give_up(walk, spot, seen) if cut is None else [cut]


def pass_split(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow the parts of a parameter's axis through a ``split``."""
    view, sizes, axis = seen[0], spot.params["sizes"], spot.params["axis"]
    if not _is_plain_parameter(view):
        return give_up(walk, spot, seen)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts: list[Seen] = [
        _cut_out(view, Stretch(axis, start, size))
        for start, size in zip(starts, sizes, strict=True)
    ]
    return give_up(walk, spot, seen) if None in parts else parts


def pass_scaling(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow a parameter that is multiplied or divided by one number, as W/σ is."""
    divides = spot.equation.primitive.name == "div"
    for kernel in (0,) if divides else (0, 1):
        look, number = seen[kernel], _one_number(spot, 1 - kernel)
        # Next to a scalar parameter any number would look like a scale.
        if look is None or not look.is_parameter or number is None or math.prod(look.shape) == 1:
            continue
        walk.findings.note(seen[1 - kernel], f"used by {spot.equation.primitive.name}")
        leaves = frozenset(part.source for part in parts_of(look))
        spot.plan.scalings[spot.index] = Scaling(1 - kernel, leaves)
        scale = (Scale(number, divides),)
        return [change_scales(look, lambda own, scale=scale: own + scale)]
    return give_up(walk, spot, seen)


def check_scales(view: View) -> None:
    """Check that an equation that reads a scaled parameter can read its scales as well.

    Raises:
      NotALayer: it cannot.
    """
    if any(scale.var is None for scale in view.scales):
        raise NotALayer("scaled outside the function or loop that holds its product")


def check_cut(cut: Stretch, site: Site) -> None:
    """Check that a part cut out of a leaf is one block of one side's Gram matrix.

    Raises:
      NotALayer: it is not.
    """
    shape = site.origin.leaf_shape
    for side in (site.leaf_view.rows, site.leaf_view.cols):
        if cut.axis in side and all(shape[axis] == 1 for axis in side if axis != cut.axis):
            return
    raise NotALayer("cut along one of several axes on a side of its product")


def _one_number(spot: Spot, operand: int) -> Any:
    """Return the variable with one entry that fills an operand, or None."""
    var = spot.equation.invars[operand]
    for equation in reversed(spot.jaxpr.eqns[: spot.index]):
        if math.prod(var.aval.shape) == 1:
            return var
        if any(var is made for made in equation.outvars):
            if equation.primitive.name not in _REPEATS:
                return None
            var = equation.invars[0]
    return var if math.prod(var.aval.shape) == 1 else None


def _is_plain_parameter(seen: Seen) -> TypeGuard[View]:
    return isinstance(seen, View) and seen.is_parameter


def _cut_out(view: View, part: Stretch) -> View | None:
    """Return the part of a view along dimension ``part.axis``, or None if it cannot be named."""
    # A second cut of a cut would need two starts, and part of an axis has no single start.
    if view.cut is not None or not view.is_whole_axis(part.axis):
        return None
    axis = view.dims[part.axis][0].axis
    dims = list(view.dims)
    dims[part.axis] = (Atom(axis, 1, part.size),)
    return dataclasses.replace(view.with_dims(dims), cut=Stretch(axis, part.start, part.size))
