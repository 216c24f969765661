"""Equations that hold jaxprs: inner functions, loops, branches, shard_maps, custom derivatives.

In: what the equation's inputs look at. Out: what its outputs look at, where an inner jaxpr hands a
view on; the plans of the inner jaxprs go into the plan as a ``Nested``.

Inside loops, branches and shard_maps only parameters are followed. A layer's output that crosses
their border has lost the way to its bias, which is then one without a layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.tracing.compat import scan_arity
from optalr.signals.tracing.jaxprs import extract, is_literal, open_jaxpr, variables
from optalr.signals.tracing.joined import Seen, parameter_or_none, parts_of
from optalr.signals.tracing.plan import (
    Branches,
    Call,
    CustomJvp,
    Derivative,
    Nested,
    Remat,
    Scan,
    ShardMap,
)
from optalr.signals.tracing.rules.multiplying import take_hand_tap
from optalr.signals.tracing.sites.hand import MARK
from optalr.signals.tracing.views import View, scan_slice
from optalr.signals.tracing.walk import Spot, Walk, give_up


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
    inputs = [parameter_or_none(look) for look in seen[1:]]
    plans = [walk(open_jaxpr(branch), inputs)[0] for branch in spot.params["branches"]]
    _add_nested(spot, Branches(spot.equation, plans))
    return []


def enter_shard_map(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk the inside of a ``shard_map``; sharded parameters are lost."""
    inputs = [parameter_or_none(look) for look in seen]
    for i, spec in enumerate(spot.params["in_specs"]):
        # Each device holds other rows of a sharded parameter; its Gram matrix would be a block.
        if inputs[i] is not None and any(entry is not None for entry in spec):
            walk.findings.note(inputs[i], "sharded over devices inside shard_map")
            inputs[i] = None
    inside = walk.inside_mesh(dict(spot.params["mesh"].shape))
    plan, _ = inside(open_jaxpr(spot.params["jaxpr"]), inputs)
    _add_nested(spot, ShardMap(spot.equation, (plan,)))
    return []


def enter_scan(walk: Walk, spot: Spot, seen: list[Seen]) -> Sequence[Seen]:
    """Walk a scan's body: constants whole, scanned leaves one slice, carries if unchanged."""
    kept = [parameter_or_none(look) for look in seen]
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
        one = scan_slice(look) if isinstance(look, View) else None
        if one is None:
            walk.findings.note(look, "scanned along an axis that is not its own")
        slices.append(one)
    plan, _ = walk(body, [*kept[:num_consts], *outputs, *slices])
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
    tangents = [parameter_or_none(looks[derivative.variables[i]]) for i in derivative.inputs]
    # What the derivative reads of the parameters themselves is data to it; a layer in it is a
    # product of data and the *tangent* of a parameter.
    values: list[Seen] = [None] * len(derivative.variables)
    plan, _ = walk(derivative.closed.jaxpr, [*values, *tangents])
    _add_nested(spot, CustomJvp(spot.equation, (plan,), derivative))
    return []


def _add_nested(spot: Spot, nested: Nested) -> None:
    """Enter inner plans into the plan, unless there is nothing to tap in them."""
    if not all(plan.is_empty for plan in nested.plans):
        spot.plan.nested[spot.index] = nested


def _trace_derivative(spot: Spot) -> list[Derivative]:
    """Trace the derivative of an equation by its own rule; nothing if it has no tangents."""
    equation = spot.equation
    read = variables(equation)
    function = extract(spot.jaxpr, [equation], inputs=read, outputs=equation.outvars)
    inputs = tuple(i for i, var in enumerate(read) if _has_tangent(var))
    outputs = tuple(i for i, var in enumerate(equation.outvars) if _has_tangent(var))
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


def _has_tangent(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)
