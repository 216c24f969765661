"""Equations that hold jaxprs: inner functions, loops, branches, shard_maps, custom derivatives.

In: what the equation's inputs look at. Out: what its outputs look at, where an inner jaxpr hands a
view on; the plans of the inner jaxprs go into the plan as a ``Nested``.

Inside loops, branches and shard_maps only parameters are followed. A layer's output that crosses
their border has lost the way to its bias, which is then one without a layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from optalr.signals.tracing.hand import MARK, take_hand_tap
from optalr.signals.tracing.jaxprs import (
    extract,
    has_tangent,
    is_literal,
    open_jaxpr,
    variables,
)
from optalr.signals.tracing.views import Seen, View, parts_of
from optalr.signals.tracing.walk import Nested, Spot, Walk, give_up


class Call(Nested):
    """An inner ``jit``: the jaxpr runs once, as it stands."""

    runs_once = True


class Remat(Nested):
    """A ``jax.checkpoint``: the jaxpr runs again in the backward pass."""


class Branches(Nested):
    """A ``cond`` or ``switch``: one of the jaxprs runs."""


class ShardMap(Nested):
    """A ``shard_map``: the jaxpr runs on each device's part of the data."""


@dataclasses.dataclass(frozen=True)
class Scan(Nested):
    """A ``scan``, or a ``fori_loop`` with static bounds: the jaxpr runs once a step.

    Attributes:
      sliced: the leaves of which the scan takes one slice a step.
    """

    sliced: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The user's derivative of one ``custom_jvp`` call, traced.

    Attributes:
      function: the call, as a function of ``variables``.
      variables: the distinct variables that it reads.
      inputs: which of them have tangents.
      outputs: which of its outputs have tangents.
      closed: the ``ClosedJaxpr`` of (all variables, tangents of inputs) -> tangents of outputs.
    """

    function: Callable[..., Any]
    variables: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    closed: Any


@dataclasses.dataclass(frozen=True)
class CustomJvp(Nested):
    """A ``custom_jvp`` call: what is tapped is its derivative, not its value.

    Attributes:
      derivative: the derivative, which the plan is for.
    """

    derivative: Derivative


def enter_call(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk an inner ``jit``, or take the layer that one of ours declares."""
    if spot.params.get("name", "").startswith(MARK):
        return take_hand_tap(walk, spot, seen)
    plan, outputs = walk(open_jaxpr(spot.params["jaxpr"]), seen)
    _add_nested(spot, Call(spot.equation, (plan,)))
    return outputs


def enter_remat(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk the inside of a ``jax.checkpoint``."""
    plan, outputs = walk(open_jaxpr(spot.params["jaxpr"]), seen)
    _add_nested(spot, Remat(spot.equation, (plan,)))
    return outputs


def enter_branches(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk the branches of a ``cond``; its first input chooses among them."""
    inputs = [_parameter_or_none(look) for look in seen[1:]]
    walked = [walk(open_jaxpr(branch), inputs) for branch in spot.params["branches"]]
    for _, outputs in walked:
        _note_lost(walk, outputs, "a branch")
    _add_nested(spot, Branches(spot.equation, [plan for plan, _ in walked]))
    return []


def enter_shard_map(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk the inside of a ``shard_map``; sharded parameters are lost."""
    inputs = [_parameter_or_none(look) for look in seen]
    for i, spec in enumerate(spot.params["in_specs"]):
        # Each device holds other rows of a sharded parameter; its Gram matrix would be a block.
        if inputs[i] is not None and any(entry is not None for entry in spec):
            walk.findings.note(inputs[i], "sharded over devices inside shard_map")
            inputs[i] = None
    inside = dataclasses.replace(walk, mesh_sizes={**walk.mesh_sizes, **spot.params["mesh"].shape})
    plan, outputs = inside(open_jaxpr(spot.params["jaxpr"]), inputs)
    _note_lost(walk, outputs, "a shard_map")
    _add_nested(spot, ShardMap(spot.equation, (plan,)))
    return []


def enter_scan(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk a scan's body: constants whole, scanned leaves one slice, carries if unchanged."""
    kept = [_parameter_or_none(look) for look in seen]
    num_consts, num_carry = scan_arity(spot.equation)
    first_scanned = num_consts + num_carry
    body = open_jaxpr(spot.params["jaxpr"])
    outputs: list[Seen] = []
    for i in range(num_consts, first_scanned):
        # A fori_loop carries even what it only reads. The body then returns the very variable that
        # it was given, and what is inside and after the loop is the parameter still.
        unchanged = body.outvars[i - num_consts] is body.invars[i]
        if not unchanged:
            walk.findings.note(kept[i], "changed by a loop that carries it")
        outputs.append(kept[i] if unchanged else None)
    slices: list[Seen] = []
    for look in kept[first_scanned:]:
        one = _scan_slice(look) if isinstance(look, View) else None
        if one is None:
            walk.findings.note(look, "scanned along an axis that is not its own")
        slices.append(one)
    plan, inner = walk(body, [*kept[:num_consts], *outputs, *slices])
    # A carry that stays what it was is followed beyond the loop, and nothing else.
    lost = [look for i, look in enumerate(inner) if i >= num_carry or outputs[i] is None]
    _note_lost(walk, lost, "a loop")
    sliced = frozenset(part.source for look in slices for part in parts_of(look))
    _add_nested(spot, Scan(spot.equation, (plan,), sliced))
    return outputs


def enter_custom_jvp(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk the user's derivative of a ``custom_jvp`` call that holds a parameter."""
    if not any(look is not None and look.is_parameter for look in seen):
        return give_up(walk, spot, seen)
    # Its trace knows nothing of the mesh: inside a shard_map it would be one of other types.
    derivatives = [] if walk.mesh_sizes else _trace_derivative(spot)
    if not derivatives:
        return give_up(walk, spot, seen)
    (derivative,) = derivatives
    looks = {v: x for v, x in zip(spot.equation.invars, seen, strict=True) if not is_literal(v)}
    tangents = [_parameter_or_none(looks[derivative.variables[i]]) for i in derivative.inputs]
    # What the derivative reads of the parameters themselves is data to it; a layer in it is a
    # product of data and the *tangent* of a parameter.
    values: list[Seen] = [None] * len(derivative.variables)
    plan, outputs = walk(derivative.closed.jaxpr, [*values, *tangents])
    _note_lost(walk, outputs, "a custom_jvp function")
    _add_nested(spot, CustomJvp(spot.equation, (plan,), derivative))
    return []


def _note_lost(walk: Walk, outputs: Sequence[Seen], place: str) -> None:
    """Note of each parameter that leaves an inner jaxpr that it cannot be followed out of."""
    for look in outputs:
        walk.findings.note(look, f"handed out of {place}")


def _add_nested(spot: Spot, nested: Nested) -> None:
    """Enter inner plans into the plan, unless there is nothing to tap in them."""
    if any(plan.taps or plan.nested for plan in nested.plans):
        spot.plan.nested[spot.index] = nested


def _trace_derivative(spot: Spot) -> list[Derivative]:
    """Trace the derivative of an equation by its own rule; nothing if it has no tangents."""
    equation = spot.equation
    read = variables(equation)
    function = extract(spot.jaxpr, [equation], inputs=read, outputs=equation.outvars)
    inputs = tuple(i for i, var in enumerate(read) if has_tangent(var))
    outputs = tuple(i for i, var in enumerate(equation.outvars) if has_tangent(var))
    if not inputs or not outputs:
        return []

    def tangents_of(args, tangents):
        def moving(moved):
            at = dict(zip(inputs, moved, strict=True))
            results = function(*(at.get(i, arg) for i, arg in enumerate(args)))
            return [results[i] for i in outputs]

        return jax.jvp(moving, ([args[i] for i in inputs],), (tangents,))[1]

    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in read]
    closed = jax.make_jaxpr(tangents_of)(shapes, [shapes[i] for i in inputs])
    return [Derivative(function, tuple(read), inputs, outputs, closed)]


def _scan_slice(view: View) -> View | None:
    """Return what one step of a scan sees of a scanned view: the view without its first axis."""
    if not view.is_whole_axis(0):
        return None
    axis = view.dims[0][0].axis
    # Steps of a scan over part of a stack would be numbered from the wrong layer.
    if view.cut is not None and view.cut.axis == axis:
        return None
    return dataclasses.replace(
        view, shape=view.shape[1:], dims=view.dims[1:], scanned=(*view.scanned, axis)
    )


def _parameter_or_none(seen: Seen) -> Seen:
    """Return ``seen`` if it is a parameter, else None."""
    return seen if seen is not None and seen.is_parameter else None


def scan_arity(equation: Any) -> tuple[int, int]:
    """Return how many constants and carries a scan has."""
    # Releases differ in the parameters that say so. The shapes say it in all of them: what is
    # scanned or stacked has one more axis outside than inside, and nothing else has.
    body = open_jaxpr(equation.params["jaxpr"])

    def rank(var):
        return len(var.aval.shape)

    carries = [rank(a) == rank(b) for a, b in zip(equation.outvars, body.outvars, strict=True)]
    scanned = [rank(a) != rank(b) for a, b in zip(equation.invars, body.invars, strict=True)]
    return len(scanned) - sum(scanned) - sum(carries), sum(carries)
