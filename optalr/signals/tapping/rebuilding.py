"""Rebuilding the equations that hold jaxprs, with the layers inside them tapped.

In: an equation, the plans of its jaxprs (``Nested``), the values of its inputs, and the recorder.
Out: the values of its outputs. The equation is written anew with jax's public functions, around
bodies that run tapped; dummies enter each body as arguments, so that reverse mode carries out what
they gather in the way of the equation: summed over steps, stacked, or summed over devices.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optalr.signals.tapping.gauge import Dummies
from optalr.signals.tapping.taps import Recorder, all_sites
from optalr.signals.tracing.inner import (
    Branches,
    Call,
    CustomJvp,
    Derivative,
    Remat,
    Scan,
    ShardMap,
    scan_arity,
)
from optalr.signals.tracing.jaxprs import (
    closed_jaxpr,
    is_literal,
    vary,
    varying_axes,
)
from optalr.signals.tracing.walk import Nested, Plan


@functools.singledispatch
def rebuild(nested: Nested, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    """Evaluate an equation that holds jaxprs, tapped by their plans."""
    raise NotImplementedError(f"no way to rebuild a {type(nested).__name__}")


@rebuild.register(Call)
def _rebuild_call(nested: Call, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    # Inlined: the whole is compiled anyway, and an inner jit would hide the slots.
    inner = closed_jaxpr(nested.equation.params["jaxpr"])
    return recorder.run(inner, nested.plans[0], values)


@rebuild.register(Remat)
def _rebuild_remat(nested: Remat, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    params, plan = nested.equation.params, nested.plans[0]
    inner = closed_jaxpr(params["jaxpr"])

    def body(slots, *args):
        return dataclasses.replace(recorder, slots=slots).run(inner, plan, args)

    # The user's policy decides what the backward pass keeps, and so what it computes again.
    body = jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return body(_slots_in(plan, recorder), *values)


@rebuild.register(Branches)
def _rebuild_branches(nested: Branches, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    # Slots are closed over here: ``switch`` makes operands of what its branches close over, and the
    # branch not taken gives them a zero cotangent.
    def tapped(branch, plan):
        return lambda *args: tuple(recorder.run(branch, plan, args))

    branches = nested.equation.params["branches"]
    chosen, *operands = values
    bodies = [tapped(branch, plan) for branch, plan in zip(branches, nested.plans, strict=True)]
    return jax.lax.switch(chosen, bodies, *operands)


@rebuild.register(Scan)
def _rebuild_scan(nested: Scan, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    params, plan = nested.equation.params, nested.plans[0]
    num_consts, num_carry = scan_arity(nested.equation)
    consts = values[:num_consts]
    init = tuple(values[num_consts : num_consts + num_carry])
    scanned = tuple(values[num_consts + num_carry :])
    # Leaves that the scan slices bring their dummies along, sliced likewise: each step fills its
    # own layer's. Dummies of shared leaves are closed over, and sum up over the steps.
    stacked = {site.leaf for site in all_sites(plan) if site.view.scanned}
    own = {leaf: recorder.slots[leaf] for leaf in nested.sliced & stacked}

    def body(carry, step):
        xs, slots = step
        inside = dataclasses.replace(recorder, slots={**recorder.slots, **slots})
        outputs = inside.run(params["jaxpr"], plan, [*consts, *carry, *xs])
        return tuple(outputs[:num_carry]), tuple(outputs[num_carry:])

    carry, ys = jax.lax.scan(
        body,
        init,
        (scanned, own),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


@rebuild.register(ShardMap)
def _rebuild_shard_map(nested: ShardMap, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    params, plan = nested.equation.params, nested.plans[0]
    inner = closed_jaxpr(params["jaxpr"])
    # The dummies enter replicated, so their sums come back summed over the devices.
    replicated = jax.sharding.PartitionSpec()

    def body(slots, *args):
        return tuple(dataclasses.replace(recorder, slots=slots).run(inner, plan, args))

    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=(replicated, *params["in_specs"]),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=_manual_axes(params),
    )(_slots_in(plan, recorder), *values)


@rebuild.register(CustomJvp)
def _rebuild_custom_jvp(nested: CustomJvp, values: list[Any], recorder: Recorder) -> Sequence[Any]:
    """Evaluate the function as it is, with its user's derivative transposed and tapped.

    The derivative is a linear function of tangents. In it a layer is a product of data and the
    *tangent* of a parameter, and the cotangent of that product is the layer's β.
    """
    derivative, plan = nested.derivative, nested.plans[0]
    args = _distinct_values(nested, values)
    axes = frozenset().union(*(varying_axes(jax.typeof(arg)) for arg in args))
    slots = jax.tree.map(lambda dummy: vary(dummy, axes), _slots_in(plan, recorder))

    # A custom_vjp around it: jax cannot tap a derivative that it transposes by itself.
    @jax.custom_vjp
    def call(slots, flag, args):
        del slots, flag
        return derivative.function(*args)

    def forward(slots, flag, args):
        return derivative.function(*args), (slots, flag, args)

    def backward(residuals, cotangents):
        slots, flag, args = residuals

        def tangent_map(slots, tangents):
            inside = dataclasses.replace(recorder, slots=slots, flag=flag)
            return inside.run(derivative.closed, plan, [*args, *tangents])

        tangents = [jnp.zeros_like(args[i]) for i in derivative.inputs]
        # The map is linear, so the point at which it is linearized does not matter: zeros will do.
        _, pull = jax.vjp(tangent_map, slots, tangents)
        slots_bar, tangents_bar = pull([cotangents[i] for i in derivative.outputs])
        return slots_bar, None, _at_inputs(derivative, tangents_bar, len(args))

    call.defvjp(forward, backward)
    return call(slots, recorder.flag, tuple(args))


def _distinct_values(nested: CustomJvp, values: list[Any]) -> list[Any]:
    """Return the values of the distinct variables that a call reads."""
    pairs = zip(nested.equation.invars, values, strict=True)
    read = {var: value for var, value in pairs if not is_literal(var)}
    return [read[var] for var in nested.derivative.variables]


def _at_inputs(derivative: Derivative, cotangents: Sequence[Any], num_args: int) -> tuple[Any, ...]:
    """Return a cotangent for each argument, None for those without a tangent."""
    at: dict[int, Any] = dict(zip(derivative.inputs, cotangents, strict=True))
    return tuple(at.get(i) for i in range(num_args))


def _slots_in(plan: Plan, recorder: Recorder) -> dict[int, Dummies]:
    """Return the dummies of the sites of one plan."""
    # Others would be carried into a remat or a shard_map, and come back as zeros, for nothing.
    own = {recorder.slot_of(site) for site in all_sites(plan)}
    return {slot: dummies for slot, dummies in recorder.slots.items() if slot in own}


def _manual_axes(shard_map_params: dict[str, Any]) -> frozenset[str]:
    """Return the mesh axes over which a ``shard_map`` equation is manual."""
    for name in ("newly_manual_axes", "manual_axes"):
        if name in shard_map_params:
            return frozenset(shard_map_params[name])
    raise NotImplementedError(f"a shard_map with parameters {sorted(shard_map_params)}")
