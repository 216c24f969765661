"""Primitives that move entries about, or add a bias to a layer's output.

In: what the equation's inputs look at. Out: what its outputs look at.
"""

from typing import TypeGuard

from optalr.signals.tracing.joined import Seen, join_parameters, rearrange
from optalr.signals.tracing.rules.biases import bias_pairs
from optalr.signals.tracing.views import View, slice_part, split_parts
from optalr.signals.tracing.walk import Spot, Walk, give_up

# Primitives whose output is their first operand, entry for entry.
UNCHANGED = frozenset({
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "name",
    "pvary", "pcast", "pbroadcast", "optimization_barrier", "mesh_cast", "reshard",
})  # fmt: skip


def pass_on(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow an array through one of ``UNCHANGED``."""
    return give_up(walk, spot, seen) if seen[0] is None else [seen[0]]


def move(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow an array through a transpose, squeeze, reshape or broadcast."""
    first = seen[0]
    if first is None:  # a dynamic size looks at something, the array does not
        return give_up(walk, spot, seen)
    moved = rearrange(spot.equation.primitive.name, spot.params, first)
    if moved is None:
        walk.findings.note(first, "reshaped across its axes before its product")
    return [moved]


def concatenate(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Join parameters; a parameter beside anything else is lost."""
    joined = join_parameters(seen, spot.params["dimension"])
    return give_up(walk, spot, seen) if joined is None else [joined]


def cut_slice(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow part of a parameter's axis through a ``slice``."""
    params, first = spot.params, seen[0]
    strided = any(stride != 1 for stride in params["strides"] or ())
    if not _is_plain_parameter(first) or strided:
        return give_up(walk, spot, seen)
    part = slice_part(first, params["start_indices"], params["limit_indices"])
    return give_up(walk, spot, seen) if part is None else [part]


def cut_split(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Follow the parts of a parameter's axis through a ``split``."""
    first = seen[0]
    if not _is_plain_parameter(first):
        return give_up(walk, spot, seen)
    parts = split_parts(first, spot.params["sizes"], spot.params["axis"])
    return give_up(walk, spot, seen) if None in parts else list(parts)


def add(walk: Walk, spot: Spot, seen: list[Seen]) -> list[Seen]:
    """Pair a layer's output with the bias added to it; other addends change nothing."""
    shape = tuple(spot.equation.outvars[0].aval.shape)
    # A layer's output stays one after the sum (of two branches, say), unless it is broadcast.
    outputs = [x for x in seen if x is not None and not x.is_parameter and x.shape == shape]
    output = outputs[0] if outputs else None
    for parameter in seen:
        if parameter is None or not parameter.is_parameter:
            continue
        pairs = bias_pairs(output, parameter, walk.findings.leaf_shapes)
        walk.findings.bias_uses.extend(pairs)
        if not pairs:
            walk.findings.note(parameter, "used by add")
    return [output]


def _is_plain_parameter(seen: Seen) -> TypeGuard[View]:
    return isinstance(seen, View) and seen.is_parameter
