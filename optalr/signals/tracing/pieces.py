"""Primitives that cut a parameter apart, or join several into one array.

In: what the equation's inputs look at. Out: what its outputs look at.
"""

import dataclasses
from typing import TypeGuard

from optalr.signals.tracing.site import Site
from optalr.signals.tracing.views import Atom, Joined, NotALayer, Seen, Stretch, View
from optalr.signals.tracing.walk import Spot, Walk, give_up


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
