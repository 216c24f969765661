"""Primitives that move entries about, or add a bias to a layer's output.

In: what the equation's inputs look at. Out: what its outputs look at.

A bias shares the output factor of its layer, so a wrong pair would precondition it wrongly: what is
not certainly a bias is none.
"""

from collections.abc import Sequence
from typing import TypeGuard

from optalr.signals.tracing.joined import Joined, Seen, join_parameters, parts_of, rearrange
from optalr.signals.tracing.sides import axes_of
from optalr.signals.tracing.sites.site import Site
from optalr.signals.tracing.views import Atom, View, slice_part, split_parts
from optalr.signals.tracing.walk import Spot, Walk, give_up

# Primitives whose output is their first operand, entry for entry. Casts are among them: moments are
# taken of the operands as the product sees them, and factors are float32 in any case.
UNCHANGED = frozenset({
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name",
    "pvary", "pcast", "pbroadcast", "optimization_barrier", "mesh_cast", "reshard",
})  # fmt: skip


def pass_unchanged(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow an array through one of ``UNCHANGED``."""
    return give_up(walk, spot, seen) if seen[0] is None else [seen[0]]


def pass_rearrangement(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow an array through a transpose, squeeze, reshape or broadcast."""
    first = seen[0]
    if first is None:  # a dynamic size looks at something, the array does not
        return give_up(walk, spot, seen)
    moved = rearrange(spot.equation.primitive.name, spot.params, first)
    # A layer's output is not noted (``note`` looks at parameters only): it just ends here.
    if moved is None:
        walk.findings.note(first, "reshaped across its axes before its product")
    return [moved]


def pass_concatenation(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Join parameters; a parameter beside anything else is lost."""
    # Data beside a parameter would make a product that is a layer in part of its columns only.
    joined = join_parameters(seen, spot.params["dimension"])
    return give_up(walk, spot, seen) if joined is None else [joined]


def pass_slice(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow part of a parameter's axis through a ``slice``."""
    params, first = spot.params, seen[0]
    strided = any(stride != 1 for stride in params["strides"] or ())
    if not _is_plain_parameter(first) or strided:
        return give_up(walk, spot, seen)
    part = slice_part(first, params["start_indices"], params["limit_indices"])
    return give_up(walk, spot, seen) if part is None else [part]


def pass_split(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow the parts of a parameter's axis through a ``split``."""
    first = seen[0]
    if not _is_plain_parameter(first):
        return give_up(walk, spot, seen)
    parts = split_parts(first, spot.params["sizes"], spot.params["axis"])
    return give_up(walk, spot, seen) if None in parts else list(parts)


def pass_addition(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Pair a layer's output with the bias added to it; other addends change nothing."""
    shape = tuple(spot.equation.outvars[0].aval.shape)
    # A layer's output stays one after the sum (of two branches, say), unless it is broadcast.
    outputs = [x for x in seen if x is not None and not x.is_parameter and x.shape == shape]
    output = outputs[0] if outputs else None
    for parameter in seen:
        if parameter is None or not parameter.is_parameter:
            continue
        pairs = _bias_pairs(output, parameter, walk.findings.leaf_shapes)
        walk.findings.bias_uses.extend(pairs)
        if not pairs:
            walk.findings.note(parameter, "used by add")
    return [output]


def _is_plain_parameter(seen: Seen) -> TypeGuard[View]:
    return isinstance(seen, View) and seen.is_parameter


def _bias_pairs(
    output: Seen, parameter: Seen, leaf_shapes: Sequence[tuple[int, ...]]
) -> list[tuple[Site, int]]:
    """Return (layer, leaf) for each bias in ``parameter``; nothing unless all of it is biases."""
    if isinstance(output, Joined) and isinstance(parameter, Joined):
        # Joined layers and joined biases must be cut at the same places, counted from the right:
        # the biases lack the dimensions of the batch.
        offset = len(output.shape) - len(parameter.shape)
        if output.axis != parameter.axis + offset or output.starts() != parameter.starts():
            return []
    elif not isinstance(output, View) or not isinstance(parameter, View):
        return []
    pairs = list(zip(parts_of(output), parts_of(parameter), strict=True))
    if not all(_is_bias(out, bias, leaf_shapes[bias.source]) for out, bias in pairs):
        return []
    return [(out.source, bias.source) for out, bias in pairs]


def _is_bias(output: View, parameter: View, leaf_shape: tuple[int, ...]) -> bool:
    """Return whether ``parameter`` has one entry for each feature of the layer's ``output``."""
    offset = len(output.dims) - len(parameter.dims)
    # Part of a bias, or a bias of part of a layer, has no factor that fits it.
    if parameter.cut is not None or output.source.view.cut is not None:
        return False
    # Layers that a scan stacks along their leading axes need biases stacked in the same way.
    if offset < 0 or parameter.scanned != tuple(range(len(output.source.view.scanned))):
        return False
    atoms: list[Atom] = []
    for axis, out_dim in enumerate(output.dims):
        dim = parameter.dims[axis - offset] if axis >= offset else ()
        of_layer = [a for a in out_dim if a.axis >= 0]
        if of_layer:
            if any(a.axis < 0 for a in (*dim, *out_dim)):
                return False
            if [a.size for a in of_layer if a.size > 1] != [a.size for a in dim if a.size > 1]:
                return False
            atoms.extend(dim)
        elif any(a.axis >= 0 and a.size > 1 for a in dim):
            # An entry for each example or position is an embedding, say, but no bias.
            return False
    axes = set(axes_of(atoms)) | set(parameter.scanned)
    every_axis_used = all(axis in axes or size == 1 for axis, size in enumerate(leaf_shape))
    return every_axis_used and bool(leaf_shape)
